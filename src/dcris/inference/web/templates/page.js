// Behind a proxy with TLS or another path, only the browser knows the address of the page.
gradio_config.root = new URL(".", location.href).href.replace(/\/$/, "");
// Before Gradio sends a file: files that are too large are refused here, in words, and not after minutes.
// Also: an image that is pasted anywhere on the page is taken, not only by the button.
window.dcris = {
  limit: Infinity,  // bytes
  answer: undefined,  // which answer is shown, and the numbers of its masks that are hidden
  hidden: new Set(),
  refuse() {
    const note = Object.assign(document.createElement("div"), {className: "note own", role: "alert"});
    note.textContent = `The image file is larger than ${this.limit / 1e6} MB; send a smaller file.`;
    document.querySelector("#note").append(note);
  },
};
const filesOf = (event) => [...(event.target?.files ?? event.dataTransfer?.files ?? event.clipboardData?.files ?? [])];
for (const name of ["change", "drop", "paste", "click"])
  document.addEventListener(name, (event) => {
    document.querySelector("#note .own")?.remove();
    const file = filesOf(event)[0];
    if (!file) return;
    if (file.size > dcris.limit) {
      event.preventDefault();
      event.stopImmediatePropagation();
      if (event.target.files) event.target.value = "";
      dcris.refuse();
    } else if (name === "paste") {
      const input = document.querySelector("#photo input[type=file]");
      if (!input) return;
      event.preventDefault();
      input.files = event.clipboardData.files;
      input.dispatchEvent(new Event("change", {bubbles: true}));
    }
  }, true);

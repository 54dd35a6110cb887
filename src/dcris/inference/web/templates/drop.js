const zone = element.querySelector(".drop"), input = zone.querySelector("input");
const give = (files) => {
  if (files.length) {
    dcris.file = files[0];
    trigger("upload");
  }
};
input.addEventListener("change", () => {
  give(input.files);
  input.value = "";  // so that the same file can be chosen again
});
for (const name of ["dragenter", "dragover", "dragleave", "drop"])
  zone.addEventListener(name, (event) => {
    event.preventDefault();
    zone.classList.toggle("over", name.startsWith("dragen") || name === "dragover");
  });
zone.addEventListener("drop", (event) => give(event.dataTransfer.files));

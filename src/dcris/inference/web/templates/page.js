window.dcris = {
  session: null,  // name of the session that holds the image on the server
  file: null,  // the image file that was dropped or chosen
  same: {__type__: "update"},  // leaves a Gradio component unchanged
  async post(route, request) {
    const body = request instanceof File ? request : JSON.stringify({session: this.session, ...request});
    let view;
    document.body.classList.add("dcris-waiting");
    try {
      view = await (await fetch(route, {method: "POST", body})).json();
    } catch {
      view = {error: "the server does not answer; try again in a moment"};
    }
    document.body.classList.remove("dcris-waiting");
    if (view.error) {
      const note = view.error[0].toUpperCase() + view.error.slice(1);
      return [note, this.same, this.same, this.same, this.same];
    }
    this.session = view.session;
    return ["", view.image, view.legend, view.downloads, view.text ?? this.same];
  },
  upload() {
    const query = new URLSearchParams({name: this.file.name, old: this.session ?? ""});
    return this.post("page/image?" + query, this.file);
  },
};

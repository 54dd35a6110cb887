// Show and hide single masks, and highlight the one whose phrase is under the pointer or has the focus.
// What is hidden is kept outside, since Gradio runs this script again when it draws the component anew.
const {hidden} = dcris;
const refresh = () => {
  const answer = element.querySelector(".result")?.dataset.answer;
  if (answer && answer !== dcris.answer) {
    hidden.clear();
    dcris.answer = answer;
  }
  for (const layer of element.querySelectorAll(".layer"))
    if (layer.hidden !== hidden.has(layer.dataset.number)) layer.hidden = !layer.hidden;  // or the observer sees a change
  for (const label of element.querySelectorAll("label")) label.firstElementChild.checked = !hidden.has(label.dataset.number);
};
const highlight = (event) => {
  const number = event.type.endsWith("out") ? undefined : event.target.closest?.("label")?.dataset.number;
  element.querySelector(".layers")?.classList.toggle("lit", number !== undefined && !hidden.has(number));
  for (const layer of element.querySelectorAll(".layer")) layer.classList.toggle("on", layer.dataset.number === number);
};
for (const name of ["pointerover", "pointerout", "focusin", "focusout"]) element.addEventListener(name, highlight);
element.addEventListener("change", (event) => {
  const {number} = event.target.closest("label").dataset;
  if (event.target.checked) hidden.delete(number);
  else hidden.add(number);
  refresh();
  highlight(event);
});
// Gradio changes single attributes of the elements that are there, where the next result is alike.
new MutationObserver(refresh).observe(element, {childList: true, subtree: true, attributeFilter: ["hidden", "data-answer"]});
refresh();

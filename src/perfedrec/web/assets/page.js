// What the pages do better with a script; without one every link and form works by loading a page.
"use strict";

const said = document.getElementById("said"); // read aloud when it changes

// Show a page of this server in place of the one that is shown, and keep the place and the focus.
async function show(answer, focus) {
  if (!(answer.headers.get("content-type") || "").startsWith("text/html")) { location.reload(); return; }
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const open = [...document.querySelectorAll("details[open][id]")].map(each => each.id);
  const from = document.querySelector("main"), to = page.querySelector("main");
  from.replaceWith(to);
  document.querySelector(".top").replaceWith(page.querySelector(".top"));
  document.title = page.title;
  for (const id of open) { const found = document.getElementById(id); if (found) found.open = true; }
  if (answer.url) history.replaceState(null, "", answer.url.replace(/[?&]done=[^#]*/, ""));
  const note = to.querySelector(".note.wrong > p") ?? to.querySelector(".note");
  if (note) said.textContent = note.textContent.trim().replace(/\s+/g, " ");
  if (focus) {
    const again = focus.id ? document.getElementById(focus.id) : null;
    const after = again || [...document.querySelectorAll(focus.kind)][focus.place] || to.querySelector("h1");
    after.focus({ preventScroll: true });
  }
}

document.addEventListener("submit", async event => {
  const form = event.target;
  if (!form.matches("form[data-here]")) return;
  event.preventDefault();
  const button = event.submitter;
  const kind = "button[data-kind=\"" + (button && button.dataset.kind || "") + "\"]";
  const focus = { id: button && button.id, kind, place: [...document.querySelectorAll(kind)].indexOf(button) };
  const data = new FormData(form, button);
  const card = form.closest("li");
  if (card) card.classList.add("leaving");
  try {
    const body = form.enctype === "multipart/form-data" ? data : new URLSearchParams(data);
    await show(await fetch(form.action, { method: "POST", body, credentials: "same-origin" }), focus);
  } catch {
    if (card) card.classList.remove("leaving");
    said.textContent = document.body.dataset.unreachable;
  }
});

// A file that is dropped on the field is imported at once.
document.addEventListener("dragover", event => {
  const field = event.target.closest && event.target.closest(".drop");
  event.preventDefault(); // a file that misses the field shall not open in the browser
  document.querySelectorAll(".drop").forEach(each => each.classList.toggle("over", each === field));
});
document.addEventListener("dragleave", event => { if (!event.relatedTarget) document.querySelectorAll(".drop").forEach(each => each.classList.remove("over")); });
document.addEventListener("drop", event => {
  event.preventDefault();
  const field = event.target.closest && event.target.closest(".drop");
  document.querySelectorAll(".drop").forEach(each => each.classList.remove("over"));
  if (!field || !event.dataTransfer.files.length) return;
  field.querySelector("input[type=file]").files = event.dataTransfer.files;
  field.requestSubmit();
});

// A page that grows by itself is loaded again while somebody looks at it.
setInterval(async () => {
  const main = document.querySelector("main[data-refresh]");
  if (!main || document.hidden || document.activeElement.closest("main form")) return;
  try {
    const answer = await fetch(location.href, { credentials: "same-origin" });
    const page = new DOMParser().parseFromString(await answer.clone().text(), "text/html").querySelector("main");
    if (answer.ok && page && page.dataset.refresh !== main.dataset.refresh && main.isConnected) {
      const at = document.activeElement.closest("details[id]");
      await show(answer);
      const again = at && document.getElementById(at.id);
      if (again) again.querySelector("summary").focus({ preventScroll: true });
    }
  } catch { /* the server has ended: what is shown stays */ }
}, 2000);

// Looks every two seconds whether the page has changed, and replaces the parts that have. What has the focus stays.
"use strict";

const EVERY = 2000;
const lost = document.getElementById("lost");
let mark = "";
let seen = new Date();

function replace(text) {
  const fresh = new DOMParser().parseFromString(text, "text/html");
  document.title = fresh.title;
  for (const part of document.querySelectorAll("[data-live]")) {
    const next = fresh.getElementById(part.id);
    if (!next || part.innerHTML === next.innerHTML) continue;
    const focused = part.contains(document.activeElement);
    const region = focused && document.activeElement.matches(".scroll");
    if (focused && !region) continue;
    part.replaceChildren(...next.childNodes);
    if (region) part.querySelector(".scroll")?.focus({ preventScroll: true });
  }
}

async function look() {
  try {
    const answer = await fetch(location.href, { headers: mark ? { "If-None-Match": mark } : {} });
    if (answer.status === 200) {
      mark = answer.headers.get("etag") ?? "";
      replace(await answer.text());
    }
    if (answer.status !== 200 && answer.status !== 304) throw new Error(answer.statusText);
    seen = new Date();
    lost.hidden = true;
  } catch {
    lost.querySelector("span").textContent = seen.toLocaleTimeString();
    lost.hidden = false;
  }
  setTimeout(look, EVERY);
}

setTimeout(look, EVERY);

// What is pleasant and not needed: a group gathered while one browses, copying it, slow parts later.
"use strict";
const cache = location.pathname.match(/^\/cache\/([^/]+)/)?.[1];
const key = `group-${cache}`;
const read = () => JSON.parse(sessionStorage.getItem(key) ?? "[]");

function show() {
  const basket = document.getElementById("basket");
  if (!basket) return;
  const chosen = read();
  basket.textContent = chosen.length ? `group (${chosen.length})` : "group";
  if (chosen.length) basket.href = `/cache/${cache}/group?features=${chosen.join(",")}`;
  for (const link of document.querySelectorAll("td .add")) {
    const there = chosen.includes(Number(link.dataset.feature));
    link.textContent = there ? "✓" : "+";
    link.setAttribute("aria-pressed", String(there));
  }
}

for (const link of document.querySelectorAll(".add")) {
  if (link.closest("td")) link.setAttribute("role", "button");
  link.addEventListener("click", (event) => {
    event.preventDefault();
    const feature = Number(link.dataset.feature);
    const chosen = read();
    const kept = chosen.includes(feature) ? chosen.filter((one) => one !== feature) : [...chosen, feature];
    sessionStorage.setItem(key, JSON.stringify(kept));
    show();
  });
}

// Parts that take a while come after the page, into the place of the link to them.
for (const place of document.querySelectorAll("[data-part]")) {
  fetch(place.querySelector("a").href).then(async (answer) => {
    if (!answer.ok) return;
    const found = new DOMParser().parseFromString(await answer.text(), "text/html");
    (place.closest("section") ?? place).replaceWith(found.getElementById(place.dataset.part));
  }).catch(() => {});
}

const copy = document.getElementById("copy");
if (copy && navigator.clipboard) {
  copy.hidden = false;
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById("yaml").textContent);
    copy.textContent = "Copied";
  });
}
show();

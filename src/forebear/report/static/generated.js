"use strict";
// Looking at a training image shows where it stands elsewhere, and where in the picture it matters.
(() => {
  document.documentElement.classList.add("js");
  const all = (selector, root) => [...root.querySelectorAll(selector)];
  all(".panel", document).forEach((panel) => {
    const heat = panel.querySelector(".heat");
    const maps = new Map(all(".pairs [data-image]", panel).map((pair) => [pair.dataset.image, pair.querySelector(".here .over").src]));
    const look = (image) => {
      all(".one", panel).forEach((one) => one.classList.toggle("same", one.dataset.image === image));
      heat.classList.toggle("shown", maps.has(image));
      if (maps.has(image)) heat.style.backgroundImage = `url(${maps.get(image)})`;
    };
    all("[data-image]", panel).forEach((one) => {
      for (const event of ["mouseenter", "focus"]) one.addEventListener(event, () => look(one.dataset.image));
      for (const event of ["mouseleave", "blur"]) one.addEventListener(event, () => look(null));
    });
  });
  // Closed parts would be missing on paper.
  window.addEventListener("beforeprint", () => all("details", document).forEach((part) => { part.open = true; }));
})();

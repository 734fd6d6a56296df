// Draws the figures of the data block into the places that the page keeps for them, in the colours
// of the style sheet, and again whenever those change: light, dark, print, another width.
"use strict";

(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const places = [...document.querySelectorAll(".plot")];
  const root = document.documentElement;

  function token(text) {
    const [name, alpha] = text.slice(1).split("/");
    const value = getComputedStyle(root).getPropertyValue("--" + name).trim();
    if (alpha === undefined) return value;
    const part = (at) => parseInt(value.slice(at, at + 2), 16);
    return `rgba(${part(1)}, ${part(3)}, ${part(5)}, ${alpha})`;
  }

  // Only values of colour and font keys are tokens: a name that begins with "@" stays a name.
  function resolved(value, key) {
    if (Array.isArray(value)) return value.map((item) => resolved(item, ""));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, resolved(v, k)]));
    }
    const names = /(color|family)$/.test(key) && typeof value === "string" && value[0] === "@";
    return names ? token(value) : value;
  }

  function hiddenGroups(place) {
    const off = place.closest("figure").querySelectorAll('.legend [aria-pressed="false"]');
    return new Set([...off].map((button) => Number(button.dataset.group)));
  }

  function draw(place, index) {
    const { data, layout } = resolved(figures[index], "");
    const hidden = hiddenGroups(place);
    for (const trace of data) trace.visible = !hidden.has(trace.meta);
    layout.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
    layout.width = place.clientWidth;
    return Plotly.react(place, data, layout, { displayModeBar: false });
  }

  const drawAll = () => Promise.all(places.map(draw));

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
      const inFigure = button.closest("figure");
      places.forEach((place, i) => inFigure.contains(place) && draw(place, i));
    });
  }

  let waiting = 0;
  const redrawSoon = () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(drawAll);
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawSoon);
  window.addEventListener("resize", redrawSoon);
  window.addEventListener("beforeprint", () => {
    root.classList.add("printing");
    drawAll();
  });
  window.addEventListener("afterprint", () => {
    root.classList.remove("printing");
    drawAll();
  });

  // Room for all charts before the first is drawn, so that a link to a section lands on it.
  places.forEach((place, i) => (place.style.minHeight = figures[i].layout.height + "px"));
  drawAll().then(() => {
    if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
    root.classList.add("drawn");
  });
})();

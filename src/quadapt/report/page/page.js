"use strict";
// Draws the charts that stand in the page as JSON, in the page's own colours, and shows one choice of a section at a time.
(() => {
  const narrow = matchMedia("(max-width: 600px)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const figures = new Map();
  // The colours of charts.py, lighter, for a dark page.
  const lighter = {
    "#0072b2": "#4ea8e0", "#d55e00": "#f08c3a", "#009e73": "#2fc79a", "#cc79a7": "#e29ac1",
    "#b8860b": "#e0b040", "#3a9ad0": "#8fd0f5", "#7a5195": "#b48ad0", "#8c8c8c": "#a8a8a8",
  };

  const coloured = (layout) => {
    const style = getComputedStyle(document.documentElement);
    const [ink, line, paper] = ["--ink", "--line", "--paper"].map((name) => style.getPropertyValue(name).trim());
    const own = { ...layout, font: { color: ink, size: narrow.matches ? 11 : 13, family: "system-ui, sans-serif" } };
    for (const name of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(name)) {
        own[name] = { ...layout[name], gridcolor: line, linecolor: line, showline: true };
      }
    }
    own.hoverlabel = { ...layout.hoverlabel, bgcolor: paper, bordercolor: line, font: { color: ink } };
    return own;
  };

  const draw = (chart) => {
    if (chart.closest("[hidden]")) {
      return; // it has no width yet: drawn when it is shown
    }
    if (!figures.has(chart)) {
      const source = chart.querySelector("script");
      figures.set(chart, source.textContent);
      source.remove();
    }
    const text = figures.get(chart);
    const { data, layout } = JSON.parse(
      dark.matches ? text.replace(/"(#[0-9a-f]{6})"/g, (all, colour) => `"${lighter[colour] || colour}"`) : text,
    );
    Plotly.react(chart, data, coloured(layout), { displayModeBar: false, responsive: true, scrollZoom: false });
  };

  const drawAll = () => document.querySelectorAll(".chart").forEach(draw);

  for (const select of document.querySelectorAll("select[data-chooses]")) {
    const choices = document.querySelectorAll(`.choice[data-of="${select.dataset.chooses}"]`);
    const show = () => {
      choices.forEach((choice) => { choice.hidden = choice.dataset.at !== select.value; });
      choices.forEach((choice) => choice.querySelectorAll(".chart").forEach(draw));
    };
    select.closest(".choose").hidden = false;
    select.addEventListener("change", show);
    show();
  }
  drawAll();
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
})();

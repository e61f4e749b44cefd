"use strict";
// Draws every chart of the page in the colours of the page. Draws it again when the system turns dark or light, when the
// reader presses a switch, and before printing, which is always light.
(async () => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 40rem)");
  const coarse = matchMedia("(pointer: coarse)");
  const PRINTED = 660; // pixels; fits A4 and Letter within the page's margins
  const PRINTED_HEIGHTS = { short: 200, normal: 270, tall: 430, huge: 640 };

  // The charting library is in the page, compressed. The browser runs it because the page's policy names its digest.
  async function unpacked(id) {
    const packed = Uint8Array.from(atob(document.getElementById(id).textContent), (each) => each.charCodeAt(0));
    return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }
  const library = document.createElement("script");
  library.textContent = await unpacked("library");
  document.head.append(library);

  const isRecord = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

  function merged(base, change) {
    const result = { ...base };
    for (const [key, value] of Object.entries(change)) {
      result[key] = isRecord(value) && isRecord(base[key]) ? merged(base[key], value) : value;
    }
    return result;
  }

  function coloured(value, style) {
    if (typeof value === "string") {
      return value.startsWith("var(--") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
    }
    if (Array.isArray(value)) return value.map((each) => coloured(each, style));
    if (!isRecord(value)) return value;
    return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, coloured(each, style)]));
  }

  // Break a title that is too long for its axis into several lines.
  function wrapped(layout, name, pixels) {
    const text = layout[name].title.text;
    const longest = Math.max(Math.floor(pixels / 7), 12);
    const lines = text.split(" ").reduce((found, word) => {
      const last = found[found.length - 1];
      if (last && last.length + word.length < longest) found[found.length - 1] = `${last} ${word}`;
      else found.push(word);
      return found;
    }, []);
    return merged(layout, { [name]: { title: { text: lines.join("<br>") } } });
  }

  function draw(name) {
    const box = document.getElementById(name);
    let { data, layout } = charts[name];
    const chosen = [...box.closest("figure").querySelectorAll("fieldset input:checked")].map((input) => input.value);
    charts[name].switches.forEach((options, place) => {
      const option = options[chosen[place]];
      data = data.map((trace, number) => merged(trace, option.data[number] ?? {}));
      layout = merged(layout, option.layout);
    });
    const printing = root.classList.contains("printing");
    layout = merged(layout, {
      uirevision: chosen.join(" "), // keeps zoom and hidden traces when only the colours change
      dragmode: coarse.matches ? false : "zoom", // a finger scrolls the page
      font: { size: narrow.matches && !printing ? 11 : 13 },
      autosize: !printing,
    });
    layout = wrapped(layout, "xaxis", printing ? PRINTED * 0.7 : box.clientWidth * (narrow.matches ? 0.5 : 0.7));
    layout = wrapped(layout, "yaxis", (printing ? PRINTED_HEIGHTS[box.dataset.height] : box.clientHeight) * 0.7);
    layout = merged(layout, printing ? { width: PRINTED, height: PRINTED_HEIGHTS[box.dataset.height] } : {});
    const style = getComputedStyle(root);
    return Plotly.react(box, coloured(data, style), coloured(layout, style), {
      responsive: !printing,
      displaylogo: false,
      displayModeBar: coarse.matches ? false : "hover",
      modeBarButtons: [["toImage", "resetScale2d"]],
      toImageButtonOptions: { filename: name, scale: 2 },
    });
  }

  const drawAll = () => Promise.all(Object.keys(charts).map(draw));

  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  for (const name of Object.keys(charts)) {
    const fieldsets = document.getElementById(name).closest("figure").querySelectorAll("fieldset");
    fieldsets.forEach((fieldset) => fieldset.addEventListener("change", () => draw(name)));
  }
  addEventListener("beforeprint", () => {
    root.classList.add("printing");
    drawAll();
  });
  addEventListener("afterprint", () => {
    root.classList.remove("printing");
    drawAll();
  });
  await drawAll();
  root.setAttribute("data-drawn", "");
})();

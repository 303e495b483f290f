// The page of a comparison: tables that sort, curves that tell values. Loads nothing.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const MARGIN = { left: 46, right: 14, top: 10, bottom: 40 };

  function element(name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // -- tables -------------------------------------------------------------------

  // A value for sorting: a number, or text in lower case; what is missing comes last.
  function valueOf(row, column) {
    const cell = row.cells[column];
    if (cell.dataset.value === undefined) return cell.textContent.toLowerCase();
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  }

  function compare(a, b, down) {
    if (a === null || b === null) return (a === null) - (b === null);
    const order = a < b ? -1 : a > b ? 1 : 0;
    return down ? -order : order;
  }

  function sort(table, column) {
    const heads = [...table.tHead.rows[0].cells];
    const down = heads[column].getAttribute("aria-sort") === "ascending";
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => compare(valueOf(a, column), valueOf(b, column), down));
    rows.forEach((row) => table.tBodies[0].append(row));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => sort(table, column));
    });
  }

  // -- curves -------------------------------------------------------------------

  // Round steps of an axis: 1, 2 or 5 times a power of ten, about `count` of them.
  function steps(low, high, count) {
    const rough = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= rough);
    const found = [];
    for (let k = Math.ceil(low / step); k * step <= high * 1.0001; k += 1) found.push(k * step);
    return found;
  }

  function shown(value) {
    const size = Math.abs(value);
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
    if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
    return String(+value.toPrecision(3));
  }

  function chart(box) {
    const data = JSON.parse(document.getElementById(box.dataset.from).textContent);
    const plot = box.querySelector(".plot");
    const tip = box.querySelector(".tip");
    const off = new Set();
    let axis = 0;
    let places = []; // of the points that are drawn

    function draw() {
      const width = Math.max(260, plot.clientWidth);
      const height = Math.round(Math.min(400, Math.max(240, width * 0.55)));
      const lines = data.lines.filter((line) => !off.has(line.mode));
      const xs = lines.flatMap((line) => line.points.map((point) => point[axis]));
      const ys = lines.flatMap((line) => line.points.map((point) => point[3]));
      const right = Math.max(...xs, 0) || 1;
      const top = Math.max(...ys, 0) || 1;
      const x = (v) => MARGIN.left + (v / right) * (width - MARGIN.left - MARGIN.right);
      const y = (v) => height - MARGIN.bottom - (v / top) * (height - MARGIN.bottom - MARGIN.top);
      const svg = element("svg", { width, height, role: "img", "aria-label": data.label });
      for (const v of steps(0, top, 5)) {
        svg.append(element("line", { class: "grid", x1: x(0), x2: x(right), y1: y(v), y2: y(v) }));
        const at = { class: "tick", x: x(0) - 6, y: y(v) + 4, "text-anchor": "end" };
        svg.append(element("text", at, shown(v)));
      }
      for (const v of steps(0, right, width / 110)) {
        const at = { class: "tick", x: x(v), y: height - 22, "text-anchor": "middle" };
        svg.append(element("text", at, shown(v)));
      }
      const middle = (x(0) + x(right)) / 2;
      const title = { class: "tick", x: middle, y: height - 5, "text-anchor": "middle" };
      svg.append(element("text", title, data.axes[axis]));
      places = [];
      for (const line of lines) {
        const at = line.points.map((point) => [x(point[axis]), y(point[3])]);
        const d = at.map(([px, py], k) => `${k ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`);
        svg.append(element("path", { class: `curve c${line.colour} d${line.dash}`, d: d.join("") }));
        at.forEach(([px, py], k) => {
          svg.append(element("circle", { class: `dot c${line.colour}`, cx: px, cy: py, r: 2.5 }));
          places.push({ px, py, line, point: line.points[k] });
        });
      }
      svg.append(element("circle", { class: "mark", r: 6, cx: -20, cy: -20 }));
      plot.replaceChildren(svg, tip);
      tip.hidden = true;
    }

    function point(event) {
      const area = plot.getBoundingClientRect();
      const [mx, my] = [event.clientX - area.left, event.clientY - area.top];
      let best = null;
      for (const place of places) {
        const far = Math.hypot(place.px - mx, place.py - my);
        if (!best || far < best.far) best = { ...place, far };
      }
      tip.hidden = !best || best.far > 60;
      const mark = plot.querySelector(".mark");
      if (tip.hidden) {
        mark.setAttribute("cx", -20);
        return;
      }
      mark.setAttribute("cx", best.px);
      mark.setAttribute("cy", best.py);
      const [samples, seconds, megabytes, score] = best.point;
      const rows = [
        best.line.name,
        `${data.score} ${score.toFixed(4)}`,
        `${Math.round(samples).toLocaleString("en")} images seen`,
        `${seconds.toFixed(1)} s`,
        `${+megabytes.toPrecision(4)} MB sent`,
      ];
      tip.replaceChildren(
        ...rows.map((text, k) => {
          const row = document.createElement(k ? "div" : "b");
          row.textContent = text;
          return row;
        }),
      );
      const room = plot.clientWidth - tip.offsetWidth - 4;
      tip.style.left = `${Math.max(0, Math.min(room, best.px + 12))}px`;
      tip.style.top = `${Math.max(0, best.py - tip.offsetHeight - 10)}px`;
    }

    for (const button of box.querySelectorAll("[data-axis]")) {
      button.addEventListener("click", () => {
        axis = Number(button.dataset.axis);
        for (const other of box.querySelectorAll("[data-axis]")) {
          other.setAttribute("aria-pressed", String(other === button));
        }
        draw();
      });
    }
    for (const button of box.querySelectorAll("[data-mode]")) {
      button.addEventListener("click", () => {
        const mode = Number(button.dataset.mode);
        if (!off.delete(mode)) off.add(mode);
        button.setAttribute("aria-pressed", String(!off.has(mode)));
        draw();
      });
    }
    plot.addEventListener("pointermove", point);
    plot.addEventListener("pointerdown", point);
    plot.addEventListener("pointerleave", () => {
      tip.hidden = true;
      plot.querySelector(".mark").setAttribute("cx", -20);
    });
    let last = 0; // a chart's own height must not draw it again
    new ResizeObserver(() => {
      if (plot.clientWidth !== last) draw();
      last = plot.clientWidth;
    }).observe(plot);
  }

  document.querySelectorAll(".chart").forEach(chart);
})();

"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const redraw = [];
  dark.addEventListener("change", () => redraw.forEach((draw) => draw()));

  // The tree of modules. An empty name is the root.
  const rows = data.graph ? data.graph.modules : {};
  const names = Object.keys(rows);
  const parent = (path) => (path.includes(".") ? path.slice(0, path.lastIndexOf(".")) : "");
  const children = new Map();
  const addPath = (path) => {
    for (let at = path; at; at = parent(at)) {
      const up = parent(at);
      if (!children.has(up)) children.set(up, []);
      if (!children.get(up).includes(at)) children.get(up).push(at);
    }
  };
  names.forEach(addPath);
  const hasParts = (path) => children.has(path);
  const below = (path, name) => path === "" || name === path || name.startsWith(`${path}.`);
  const adapted = new Map();
  for (const site of data.sites) adapted.set(site.module, [...(adapted.get(site.module) || []), ...site.methods]);
  const quantized = new Set((data.quantization ? data.quantization.layers : []).map((layer) => layer.module));
  const kindOf = (path, after) => {
    if (!after) return "plain";
    const any = (test) => names.some((name) => below(path, name) && test(name)) || (test(path) && !hasParts(path));
    if (any((name) => adapted.has(name) || (rows[name] && rows[name].added))) return "adapted";
    return any((name) => quantized.has(name)) ? "quantized" : "plain";
  };
  const total = (counts) => Object.values(counts || {}).reduce((sum, count) => sum + count, 0);
  const operations = (path, after) => {
    let sum = 0;
    for (const name of names) {
      if (!below(path, name)) continue;
      const row = rows[name];
      sum += total(after && row.after ? row.after : row.before) + (after ? total(row.added) : 0);
    }
    return sum;
  };

  // What is shown: the open modules, and in place of each closed one a node.
  const open = new Set([""]);
  for (let path = ""; (children.get(path) || []).length === 1 && hasParts(children.get(path)[0]); ) {
    path = children.get(path)[0];
    open.add(path);
  }
  const largest = (children.get("") || []).filter(hasParts).sort((a, b) => names.filter((name) => below(b, name)).length - names.filter((name) => below(a, name)).length)[0];
  if (open.size === 1 && largest) open.add(largest);
  const nodeOf = (name) => {
    const parts = name ? name.split(".") : [];
    let path = "";
    if (!open.has("")) return "";
    for (const part of parts) {
      path = path ? `${path}.${part}` : part;
      if (!open.has(path)) return path;
    }
    return hasParts(path) ? `${path}.*` : path;
  };
  const elements = (after) => {
    const nodes = new Map();
    const shown = new Set(names.map(nodeOf));
    for (const path of open) if (path && hasParts(path) && [...shown].some((id) => id.startsWith(`${path}.`))) {
      nodes.set(path, { data: { id: path, label: path.slice(path.lastIndexOf(".") + 1), parent: open.has(parent(path)) && parent(path) ? parent(path) : undefined, box: 1 } });
    }
    for (const id of shown) {
      const own = id.endsWith(".*"), path = own ? id.slice(0, -2) : id, up = own ? path : parent(path);
      const short = own ? "own operations" : path.slice(path.lastIndexOf(".") + 1) || "root";
      const count = own ? total(after && rows[path].after ? rows[path].after : rows[path].before) + (after ? total(rows[path].added) : 0) : operations(path, after);
      const methods = after && !hasParts(path) && adapted.get(path);
      const label = `${short}${methods ? ` + ${methods.join(", ")}` : ""}\n${count} operation${count === 1 ? "" : "s"}`;
      nodes.set(id, { data: { id, path, label, kind: own && !rows[path].added ? "plain" : kindOf(path, after), closed: !own && hasParts(path) ? 1 : 0, parent: up && nodes.has(up) ? up : undefined } });
    }
    const edges = new Map();
    for (const [from, to] of data.graph.flows) {
      const a = nodeOf(names[from]), b = nodeOf(names[to]);
      if (a !== b) edges.set(`${a}>${b}`, { data: { id: `${a}>${b}`, source: a, target: b } });
    }
    for (const { data: node } of nodes.values()) {
      const lines = node.label.split("\n");
      node.width = 24 + 7 * Math.max(...lines.map((line) => line.length));
      node.height = 14 + 16 * lines.length;
    }
    return [...nodes.values(), ...edges.values()];
  };
  const style = () => [
    { selector: "node", style: { label: "data(label)", "text-wrap": "wrap", "text-valign": "center", "font-size": 12, color: color("text"), shape: "round-rectangle", width: "data(width)", height: "data(height)", "background-color": color("card"), "border-width": 2, "border-color": color("plain") } },
    { selector: "node[box]", style: { "text-valign": "top", "background-color": color("page"), "border-width": 1, "border-style": "dashed", color: color("soft") } },
    { selector: "node[closed = 1]", style: { "border-style": "double", "border-width": 4 } },
    { selector: "node[kind = 'adapted']", style: { "border-color": color("adapted"), "font-weight": "bold" } },
    { selector: "node[kind = 'quantized']", style: { "border-color": color("quantized") } },
    { selector: "edge", style: { width: 1.5, "line-color": color("plain"), "target-arrow-color": color("plain"), "target-arrow-shape": "triangle", "curve-style": "bezier", "arrow-scale": 0.8 } },
    { selector: ".match", style: { "background-color": color("accent"), color: color("card") } },
  ];
  const layout = { name: "dagre", rankDir: "TB", nodeSep: 24, rankSep: 36, animate: false, fit: true, padding: 16 };

  if (data.graph) {
    cytoscape.use(cytoscapeDagre);
    const views = ["before", "after"].map((id) =>
      cytoscape({ container: document.getElementById(id), elements: elements(id === "after"), style: style(), layout, minZoom: 0.05, maxZoom: 4 }));
    window.adaptcViews = views;
    const draw = () => views.forEach((view, index) => {
      view.elements().remove();
      view.add(elements(index === 1));
      view.layout(layout).run();
    });
    const READABLE = 0.6;
    const begin = () => views.forEach((view) => {
      if (view.zoom() >= READABLE) return;
      view.zoom(READABLE);
      view.center();
      const top = view.elements().boundingBox().y1;
      view.pan({ x: view.pan().x, y: 16 - top * READABLE });
    });
    begin();
    redraw.push(() => views.forEach((view) => view.style(style())));
    const follow = (source, other) => {
      if (follow.busy) return;
      follow.busy = true;
      other.viewport({ zoom: source.zoom(), pan: source.pan() });
      follow.busy = false;
    };
    views.forEach((view, index) => view.on("viewport", () => follow(view, views[1 - index])));
    const counts = (some) => Object.entries(some || {}).map(([name, count]) => (count > 1 ? `${name} × ${count}` : name)).join(", ");
    const tell = (path) => {
      const row = rows[path];
      const lines = [`${path || "root"}${row ? ` (${row.type})` : ""}: operations before: ${operations(path, false)}, after: ${operations(path, true)}.`];
      if (row && !hasParts(path)) {
        lines.push(`Before: ${counts(row.before) || "none"}. After: ${counts(row.after || row.before) || "none"}${row.added ? `; its adapter: ${counts(row.added)}` : ""}.`);
      }
      if (adapted.has(path)) lines.push(`Adapted by ${adapted.get(path).join(", ")}.`);
      document.getElementById("module").textContent = lines.join(" ");
    };
    views.forEach((view) => view.on("tap", "node", (event) => {
      const id = event.target.id(), path = id.endsWith(".*") ? id.slice(0, -2) : id;
      tell(path);
      if (id.endsWith(".*")) return;
      if (open.has(path)) open.delete(path);
      else if (hasParts(path)) open.add(path);
      else return;
      draw();
      begin();
    }));
    const on = (id, does) => document.getElementById(id).addEventListener("click", does);
    on("open", () => { children.forEach((_, path) => open.add(path)); draw(); begin(); });
    on("close", () => { open.clear(); open.add(""); draw(); begin(); });
    on("fit", () => views.forEach((view) => view.fit(undefined, 16)));
    const zoom = (factor) => views[1].zoom({ level: views[1].zoom() * factor, renderedPosition: { x: views[1].width() / 2, y: views[1].height() / 2 } });
    on("nearer", () => zoom(1.4));
    on("farther", () => zoom(1 / 1.4));
    document.getElementById("search").addEventListener("input", (event) => {
      const text = event.target.value.trim();
      const found = text ? names.find((name) => name.includes(text)) : undefined;
      if (found === undefined) { views.forEach((view) => view.elements().removeClass("match")); return; }
      for (let path = parent(found); path; path = parent(path)) open.add(path);
      draw();
      views.forEach((view) => {
        const matches = view.nodes().filter((node) => !node.data("box") && node.id().includes(text));
        matches.addClass("match");
        if (matches.length) view.animate({ center: { eles: matches[0] }, zoom: 1, duration: 0 });
      });
      tell(found);
    });
  }

  // Charts
  const charts = [];
  const themed = () => { Chart.defaults.color = color("soft"); Chart.defaults.borderColor = color("line"); };
  themed();
  Chart.defaults.animation = false;
  Chart.defaults.maintainAspectRatio = false;
  const holder = document.getElementById("bars");
  for (const chart of data.bars) {
    const box = document.createElement("div"), title = document.createElement("h3"), frame = document.createElement("div"), canvas = document.createElement("canvas");
    title.textContent = chart.title;
    frame.className = "chart";
    frame.style.height = `${70 + 34 * chart.rows.length}px`;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${chart.title}: ${chart.rows.map((row) => `${row.name} ${row.shown}`).join(", ")}`);
    frame.append(canvas);
    box.append(title, frame);
    holder.append(box);
    charts.push(() => new Chart(canvas, {
      type: "bar",
      data: { labels: chart.rows.map((row) => row.name), datasets: [{ data: chart.rows.map((row) => row.value), backgroundColor: color("accent") }] },
      options: { indexAxis: "y", plugins: { legend: { display: false }, tooltip: { callbacks: { label: (item) => chart.rows[item.dataIndex].shown } } }, scales: { x: { beginAtZero: true, ticks: { maxTicksLimit: 4 }, title: { display: true, text: chart.unit } } } },
    }));
  }
  if (data.quantization) {
    const canvas = document.getElementById("scatter");
    charts.push(() => new Chart(canvas, {
      type: "scatter",
      data: { datasets: [{ data: data.quantization.layers.map((layer) => ({ x: layer.bytes, y: layer.output })), backgroundColor: color("quantized"), pointRadius: 5 }] },
      options: { plugins: { legend: { display: false }, tooltip: { callbacks: { label: (item) => data.quantization.layers[item.dataIndex].module } } }, scales: { x: { title: { display: true, text: "bytes" } }, y: { title: { display: true, text: "error of the output" } } } },
    }));
  }
  let drawn = charts.map((make) => make());
  redraw.push(() => { drawn.forEach((chart) => chart.destroy()); themed(); drawn = charts.map((make) => make()); });
})();

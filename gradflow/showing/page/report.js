"use strict";
// The table filters and sorts itself; ticks in it decide which runs all charts draw.
{
  const page = JSON.parse(document.getElementById("data").textContent);
  const runs = new Map(page.runs.map((run) => [run.number, run]));
  const rows = Object.fromEntries(Object.entries(page.tables).map(([name, table]) => [name, rowsOf(table)]));
  const charts = Object.entries(page.charts).map(([name, chart]) => ({
    ...chart, name, figure: document.getElementById(name), value: Object.keys(chart.columns)[0],
  }));
  const body = document.querySelector("#table tbody");
  const lines = [...body.rows].map((line) => ({ line, text: line.textContent.toLowerCase() }));
  const find = document.getElementById("find");
  const verdict = document.getElementById("verdict");
  const MOST_DRAWN = 60;

  // From columns to one object per row, with the names of its run.
  function rowsOf(table) {
    const names = Object.keys(table);
    return table.number.map((number, i) => {
      const { run, design } = runs.get(number);
      return Object.fromEntries([...names.map((name) => [name, table[name][i]]), ["run", run], ["design", design]]);
    });
  }

  function ticked() {
    return new Set([...body.querySelectorAll("input:checked")].map((box) => Number(box.value)));
  }

  function rowsToDraw(chart) {
    const drawn = ticked();
    const designs = new Set([...drawn].map((number) => runs.get(number).design));
    const wanted = chart.table === "depths" ? (row) => designs.has(row.design) : (row) => drawn.has(row.number);
    return rows[chart.table].filter((row) => wanted(row) && (chart.table === "units" || row[chart.value] !== null));
  }

  // The ends of the vertical axis, and the runs that they leave outside: chart_tables.axis_ends here.
  function ends(shown, chart) {
    const spans = new Map();
    for (const row of shown) {
      const values = chart.span.map((name) => row[name]).filter((value) => value !== null);
      if (row[chart.value] === null) continue;
      const [low, high] = spans.get(row.number) ?? [Infinity, -Infinity];
      spans.set(row.number, [Math.min(low, ...values), Math.max(high, ...values)]);
    }
    const reach = ([low, high]) => Math.max(Math.abs(low), Math.abs(high));
    const ordered = [...spans.values()].map(reach).sort((a, b) => a - b);
    const middle = (ordered[(ordered.length - 1) >> 1] + ordered[ordered.length >> 1]) / 2;
    const limit = chart.near === null ? Infinity : Math.max(chart.near, page.far * middle);
    let far = [...spans.keys()].filter((number) => reach(spans.get(number)) > limit);
    if (far.length === spans.size) far = [];
    const inside = [...spans.keys()].filter((number) => !far.includes(number)).map((number) => spans.get(number));
    const bottom = Math.min(chart.seen[0], ...inside.map((span) => span[0]));
    const top = Math.max(chart.seen[1], ...inside.map((span) => span[1]));
    return { bottom, top, far };
  }

  function note(chart, shown, far) {
    const text = chart.figure.querySelector(".note");
    const values = shown.filter((row) => row[chart.value] !== null);
    const lost = shown.filter((row) => row[chart.value] === null && row.unit !== "input");
    const gone = new Set(lost.map((row) => row.number));
    const notes = [];
    if (!values.length) notes.push("None of the drawn runs has these numbers.");
    else if (gone.size) notes.push(`Where a line has a gap the value is zero, not finite or missing (${plural(gone.size, "run")}).`);
    if (far.length) {
      const names = far.slice(0, 3).map((number) => runs.get(number).run).join("; ");
      notes.push(`Beyond the picture: ${names}${far.length > 3 ? ` and ${far.length - 3} more` : ""}. Draw such a run alone, or zoom out, to see it.`);
    }
    text.textContent = notes.join(" ");
    const picture = chart.figure.querySelector(".picture");
    picture.classList.toggle("empty", !values.length);
    picture.setAttribute("aria-label", description(chart, values));
  }

  function description(chart, values) {
    const numbers = values.map((row) => row[chart.value]);
    const many = new Set(values.map((row) => row.number)).size;
    if (!many) return `${chart.title}: nothing to draw`;
    const low = numbers.reduce((a, b) => Math.min(a, b)), high = numbers.reduce((a, b) => Math.max(a, b));
    return `${chart.title}. ${plural(many, "run")}; ${chart.columns[chart.value]} from ${low} to ${high}. The numbers are in the table below.`;
  }

  const plural = (many, noun) => `${many.toLocaleString("en")} ${noun}${many === 1 ? "" : "s"}`;

  // The same numbers as a table, made when it is opened.
  function fillNumbers(chart) {
    const details = chart.figure.querySelector(".numbers");
    const place = details.querySelector(".scroll");
    place.replaceChildren();
    if (!details.open) return;
    const shown = rowsToDraw(chart).filter((row) => row[chart.value] !== null);
    const where = { units: { layer: "layer", unit: "unit" }, depths: { verdict: "verdict" }, times: { unit: "unit", pass: "pass" }, losses: { step: "step" }, heats: { layer: "layer", step: "step" } };
    const columns = { run: "run", ...where[chart.table], ...chart.columns };
    const used = Object.keys(columns).filter((name) => shown.some((row) => row[name] !== null));
    const table = document.createElement("table");
    table.createCaption().textContent = chart.title;
    addRow(table.createTHead(), used.map((name) => columns[name]), "col");
    const lines = document.createElement("tbody");
    for (const row of shown) addRow(lines, used.map((name) => row[name] ?? ""), "row");
    table.append(lines);
    place.append(table);
  }

  function addRow(parent, cells, scope) {
    const line = document.createElement("tr");
    cells.forEach((cell, i) => {
      const heading = scope === "col" || i === 0;
      const element = document.createElement(heading ? "th" : "td");
      if (heading) element.scope = scope;
      element.textContent = cell;
      line.append(element);
    });
    parent.append(line);
  }

  async function embed(chart, shown, steering) {
    const params = chart.spec.params?.map((param) => ({ ...param, value: steering[param.name] ?? param.value }));
    const spec = { ...chart.spec, ...(params && { params }), datasets: { [chart.table]: shown } };
    const place = chart.figure.querySelector(".plot"); // its label is Vega's, that around it ours
    chart.view = (await vegaEmbed(place, spec, { actions: false, renderer: "svg" })).view;
    if (!chart.bars) follow(chart);
  }

  async function draw(chart) {
    const shown = rowsToDraw(chart);
    const { bottom, top, far } = ends(shown, chart);
    note(chart, shown, far);
    fillNumbers(chart);
    // A scale without a value would complain.
    if (!shown.some((row) => row[chart.value] !== null)) return;
    const designs = new Set(shown.map((row) => row.design));
    const listed = [...new Set(page.runs.map((run) => run.design))].filter((design) => designs.has(design));
    if (!chart.view) await embed(chart, shown, { bottom, top, listed });
    chart.view.data(chart.table, shown);
    if (chart.bars) chart.view.height(page.bar * new Set(shown.map((row) => row.bar)).size);
    else chart.view.signal("bottom", bottom).signal("top", top).signal("listed", listed);
    await chart.view.resize().runAsync();
    await chart.view.resize().runAsync(); // now that the legend has its new size
  }

  // What is chosen in one legend is chosen in all charts.
  let following = false;
  function follow(chart) {
    chart.view.addDataListener("chosen_store", async (_, chosen) => {
      if (following) return;
      following = true;
      const others = charts.filter((other) => other !== chart && other.view && !other.bars);
      await Promise.all(others.map((other) => other.view.data("chosen_store", chosen).runAsync()));
      following = false;
    });
  }

  async function drawAll() {
    for (const box of body.querySelectorAll("input")) box.closest("td").dataset.v = Number(box.checked);
    await Promise.all(charts.map(draw));
  }

  function filter() {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let listed = 0;
    for (const { line, text } of lines) {
      const fits = !verdict.value || line.querySelector(".verdict").textContent === verdict.value;
      line.hidden = !(fits && words.every((word) => text.includes(word)));
      listed += !line.hidden;
    }
    document.getElementById("listed").textContent = `${listed.toLocaleString("en")} of ${plural(lines.length, "run")} listed`;
  }

  function sort(button) {
    const heading = button.closest("th");
    const column = heading.cellIndex;
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of heading.parentNode.cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = button.dataset.kind === "text"
      ? (line) => line.cells[column].textContent
      : (line) => (line.cells[column].dataset.v === undefined ? null : Number(line.cells[column].dataset.v));
    const keyed = lines.map(({ line }) => [key(line), line]);
    // Missing values come last, whichever way is up.
    keyed.sort(([a], [b]) => (a === null) - (b === null) || (down ? -1 : 1) * (typeof a === "string" ? a.localeCompare(b) : a - b));
    body.append(...keyed.map(([, line]) => line));
  }

  function drawListed() {
    let left = MOST_DRAWN;
    for (const line of body.rows) {
      const box = line.querySelector("input");
      if (box) box.checked = !line.hidden && left-- > 0;
    }
    drawAll();
  }

  find.addEventListener("input", filter);
  verdict.addEventListener("change", filter);
  find.form.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("draw").addEventListener("click", drawListed);
  body.addEventListener("change", drawAll);
  for (const button of document.querySelectorAll("#table th button")) button.addEventListener("click", () => sort(button));
  filter();
  for (const chart of charts) chart.figure.querySelector(".numbers").addEventListener("toggle", () => fillNumbers(chart));
  drawAll().then(() => { document.documentElement.dataset.ready = "yes"; });
}

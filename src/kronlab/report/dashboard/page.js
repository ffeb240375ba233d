// The dashboard's program: draws tables, charts and the record behind a number from the data that the page carries.
// All text goes in as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const collator = new Intl.Collator("en", { numeric: true });
const MORE = 100; // lines of a long table that are drawn at once

// ---------------------------------------------------------------------------------------------------- elements

/** h("a.quiet", {href: "#x", onclick: f}, "text", element, ...) -> element; null children are left out. */
function h(name, properties = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "dataset") Object.assign(element.dataset, value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== "" && child !== false));
  return element;
}

const byId = (id) => document.getElementById(id);
const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
const number = (value, digits = 4) => (value == null ? "" : Number(value.toPrecision(digits)).toLocaleString("en", { maximumSignificantDigits: digits }));
const tableName = (name) => name.replace(/^table(\d+)/, "Table $1").replace(/-/g, ", ");

function command(text) {
  if (!text) return null;
  const copy = h("button.copy", { type: "button", "aria-label": `Copy the command ${text}` }, "Copy");
  const pre = h("pre", {}, h("code", {}, text));
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(pre); // where the browser gives no clipboard to files, the user's own copy works
      copy.textContent = "Selected";
    }
    setTimeout(() => (copy.textContent = "Copy"), 2000);
  });
  return h("div.command", {}, pre, copy);
}

const recordPath = (record) => `${data.results}/runs/${record.scale}/${record.id}.json`;
const link = (path, text) => h("a", { href: path.split("/").map((part) => (part === "file:" ? part : encodeURIComponent(part))).join("/") }, text ?? path.split("/").pop());
const recordLink = (record) => link(recordPath(record), record.id);

/** A cell's text with what follows the value set lighter; its text content stays as it is. */
function valueText(text) {
  const cut = text.search(/ [±[]/);
  return cut < 0 ? [text] : [text.slice(0, cut), h("span.spread", {}, text.slice(cut))];
}

// ------------------------------------------------------------------------------------------------------ tables

/**
 * A table that sorts by its heads. columns: {title, right, draw(row) -> nodes, sort(row) -> number | string | null};
 * the first one heads the rows. Lines beyond `limit` are drawn when asked for. keep(row) says whether a row is shown.
 */
class SortedTable {
  constructor({ label, columns, rows, limit = Infinity }) {
    Object.assign(this, { columns, rows, limit, by: -1, way: 0, shown: limit });
    this.heads = columns.map((column, at) =>
      h(column.right ? "th.right" : "th", { scope: "col" }, h("button", { type: "button", onclick: () => this.sortBy(at) }, column.title)));
    this.body = h("tbody");
    this.lines = new Map();
    const table = h("table", {}, h("caption", {}, h("span", {}, label)), h("thead", {}, h("tr", {}, this.heads)), this.body);
    this.scroll = h("div.scroll", { role: "region", tabindex: "0", "aria-label": `${label} (scrolls sideways)` }, table);
    this.more = h("button.more", { type: "button", hidden: true, onclick: () => { this.shown += MORE; this.draw(); } });
    this.element = h("div", {}, this.scroll, this.more);
    this.keep = () => true;
    this.draw();
  }

  sortBy(at) {
    this.way = this.by === at ? (this.way === 1 ? -1 : 0) : 1; // up, down, as it was
    this.by = this.way ? at : -1;
    this.heads.forEach((head, i) => (i === this.by ? head.setAttribute("aria-sort", this.way > 0 ? "ascending" : "descending") : head.removeAttribute("aria-sort")));
    this.draw();
  }

  filter(keep) {
    this.keep = keep;
    this.shown = this.limit;
    return this.draw();
  }

  ordered() {
    const rows = this.rows.filter(this.keep);
    if (this.by < 0) return rows;
    const { sort } = this.columns[this.by];
    const empty = (value) => value == null || value === "";
    return rows.map((row) => [sort(row), row]).sort(([a], [b]) => {
      if (empty(a) || empty(b)) return empty(a) - empty(b); // what is not known comes last, whichever way
      return this.way * (typeof a === "number" && typeof b === "number" ? a - b : collator.compare(a, b));
    }).map(([, row]) => row);
  }

  draw() {
    const rows = this.ordered();
    this.body.replaceChildren(...rows.slice(0, this.shown).map((row) => this.line(row)));
    this.more.hidden = rows.length <= this.shown;
    this.more.textContent = `Show ${Math.min(MORE, rows.length - this.shown)} more of ${count(rows.length, "line")}`;
    return rows.length;
  }

  line(row) {
    if (!this.lines.has(row)) {
      const cells = this.columns.map((column, at) => h(at ? (column.right ? "td.right" : "td") : "th", at ? {} : { scope: "row" }, column.draw(row)));
      this.lines.set(row, h("tr", {}, cells));
    }
    return this.lines.get(row);
  }
}

// -------------------------------------------------------------------------------------- where a number comes from

function open(title, ...children) {
  const dialog = byId("source");
  const close = h("button.quiet", { type: "button", onclick: () => dialog.close() }, "Close");
  dialog.replaceChildren(h("div.head", {}, h("h2", { id: "source-title" }, title), close), ...children.flat(Infinity).filter(Boolean));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

function facts(pairs) {
  const known = pairs.filter(([, value]) => value != null && value !== "" && value !== false);
  return h("dl", {}, known.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

const metricText = ([value, stderr, n]) => `${number(value, 6)}${stderr == null ? "" : ` ± ${number(stderr, 2)}`} (${count(n, "sample")})`;

const costColumns = [
  { title: "trainable parameters", right: true, draw: (r) => r.trainable?.toLocaleString("en") ?? "", sort: (r) => r.trainable },
  { title: "training (s)", right: true, draw: (r) => number(r.seconds), sort: (r) => r.seconds },
  { title: "peak memory (GiB)", right: true, draw: (r) => (r.peak == null ? "" : number(r.peak / 2 ** 30, 3)), sort: (r) => r.peak },
];

/** The records of a row: seed, task, the metrics that matter, and a link each. */
function recordTable(label, places, parts, costs) {
  const records = places.map((place) => data.records[place]);
  const metrics = parts.length ? parts : [...new Set(records.flatMap((record) => Object.keys(record.metrics)))].slice(0, 6);
  return new SortedTable({
    label,
    rows: records,
    limit: MORE,
    columns: [
      { title: "record", draw: (r) => recordLink(r), sort: (r) => r.id },
      { title: "seed", right: true, draw: (r) => (r.seed == null ? "none" : `${r.seed}`), sort: (r) => r.seed },
      { title: "task", draw: (r) => r.task || "none", sort: (r) => r.task },
      { title: "status", draw: (r) => r.status, sort: (r) => r.status },
      ...(costs ? costColumns : []),
      ...metrics.map((metric) => ({ title: metric, right: true, draw: (r) => (r.metrics[metric] ? metricText(r.metrics[metric]) : ""), sort: (r) => r.metrics[metric]?.[0] })),
    ],
  }).element;
}

/** What stands behind a number of a table (or, without a column, behind a row). */
function openNumber(section, row, block, column) {
  const at = section.rows.indexOf(row);
  const text = column ? column.cells[at] : "";
  const baseline = column && block.title.startsWith("Paired") ? section.rows.find((other) => other.key === row.baseline) : null;
  const parts = column ? column.parts : [];
  const title = [row.label, row.group && `(${row.group})`].filter(Boolean).join(" ");
  const published = column && !column.title.includes("published") ? [] : Object.entries(row.published);
  const commands = [...new Set(row.records.map((place) => data.records[place].command))];
  open(
    column ? `${title}: ${column.title}` : title,
    column && h("p.value", {}, valueText(text)),
    h("p.soft", {}, [column && block.title, tableName(section.name), `scale ${section.scale}`, seedsText(section, row)].filter(Boolean).join(" · ")),
    !column && h("dl", {}, section.blocks.flatMap((b) => b.columns.filter((c) => c.cells[at]).flatMap((c) => [h("dt", {}, [b.title, c.title].filter(Boolean).join(": ")), h("dd", {}, c.cells[at])]))),
    section.measured && [
      h("h4", {}, "The measurement that it is from"),
      facts([["record", link(`${data.results}/${section.measured.path}`)], ["commit", section.measured.commit]]),
      command(section.measured.command),
    ],
    row.records.length > 0 && [h("h4", {}, `${count(row.records.length, "record")} behind it, values as recorded`), recordTable(`Records of ${title}`, row.records, parts, !parts.length)],
    baseline && [h("h4", {}, `Compared with ${baseline.label}`), recordTable(`Records of ${baseline.label}`, baseline.records, parts)],
    published.length > 0 && [
      h("h4", {}, "Published"),
      h("ul", {}, published.map(([name, p]) => h("li", {}, `${name}: ${p.value}, ${p.source} [${p.confidence}]`))),
    ],
    commands.length > 0 && [h("h4", {}, `What made ${row.records.length > 1 ? "them" : "it"}`), commands.map(command)],
    h("h4", {}, "The whole table again"),
    command(section.command),
  );
}

function openRecord(record) {
  open(
    `${record.label}, ${record.task || "no training"}${record.seed == null ? "" : `, seed ${record.seed}`}`,
    facts([
      ["record", recordLink(record)], ["status", record.status], ["error", record.error], ["scale", record.scale],
      ["model", record.model], ["method", record.method], ["task", record.task], ["seed", record.seed == null ? null : `${record.seed}`],
      ["trainable parameters", record.trainable?.toLocaleString("en")],
      ["training", record.seconds == null ? null : `${number(record.seconds)} s`],
      ["peak memory, training", record.peak == null ? null : `${number(record.peak / 2 ** 30, 3)} GiB`],
      ...Object.entries(record.metrics).map(([name, found]) => [name, metricText(found)]),
      ["finished", record.finished], ["commit", record.commit && `${record.commit}${record.dirty ? ", with changes" : ""}`],
    ]),
    h("h4", {}, "What made it"),
    command(record.command),
  );
}

// ---------------------------------------------------------------------------------------------------- sections

function seedsText(section, row) {
  if (section.measured) return "measured";
  if (!row.records.length) return "not run yet";
  const missing = row.cells > row.records.length ? `, ${row.records.length} of ${count(row.cells, "cell")} run` : "";
  return (row.seeds ? count(row.seeds, "seed") : "no seed") + missing;
}

function blockTable(section, block) {
  const rows = section.rows;
  const at = new Map(rows.map((row, place) => [row, place]));
  const head = {
    title: [section.groupTitle, section.rowTitle].filter(Boolean).join(", "),
    draw: (row) => [
      h("button.row", { type: "button", title: "Where these numbers come from", onclick: () => openNumber(section, row) }, row.label),
      h("small", {}, [row.group, section.scale, seedsText(section, row)].filter(Boolean).join(" · ")),
    ],
    sort: (row) => `${row.group} ${row.label}`,
  };
  const columns = block.columns.map((column) => ({
    title: column.title,
    right: true,
    // a mouse opens a single number; the keyboard has one stop a row, the button above, which shows all of its numbers
    draw: (row) => {
      const text = column.cells[at.get(row)];
      if (!text) return "";
      const state = /^(failed|diverged)$/.test(text) ? ".state" : "";
      return h(`button.num${state}`, { type: "button", tabindex: "-1", onclick: () => openNumber(section, row, block, column) }, valueText(text));
    },
    sort: (row) => column.values[at.get(row)] ?? null,
  }));
  const label = [tableName(section.name), `scale ${section.scale}`, block.title || (section.measured ? section.title : "scores")].join(", ");
  const table = new SortedTable({ label, columns: [head, ...columns], rows, limit: 2 * MORE });
  table.scroll.querySelector("table").dataset.block = block.title;
  return table;
}

const rowFilters = [];

function sectionElement(section) {
  const tables = section.blocks.map((block) => [block, blockTable(section, block)]);
  const run = section.measured ? null : `${section.recorded} of ${count(section.planned, "cell")} recorded`;
  const badge = (text) => h("span.badge", {}, text);
  const element = h("article", { id: section.id, "aria-labelledby": `${section.id}-title` },
    h("h3", { id: `${section.id}-title` }, section.name === section.number ? "" : `${section.title} `, badge(`scale ${section.scale}`), run && h("span.soft.where", {}, run)),
    h("p.soft", {}, section.about),
    tables.map(([block, table]) => [block.title && h("h4", {}, block.title), table.element]),
    section.charts.map((chart) => figure(section, chart)),
    h("details", {}, h("summary", {}, `Setting, recipes and machine: ${count(section.notes.length, "note")}`), h("ul", {}, section.notes.map((note) => h("li", {}, note.replaceAll("`", ""))))),
    command(section.command));
  rowFilters.push((wanted) => {
    const keep = (row) => wanted.row(section, row);
    const shown = tables.map(([, table]) => table.filter(keep));
    element.hidden = shown.every((n) => n === 0) && section.rows.length > 0;
    return [shown[0] ?? 0, section.rows.length];
  });
  return element;
}

function drawTables() {
  const numbers = [...new Set(data.tables.map((section) => section.number))];
  byId("tables").replaceChildren(...numbers.map((number) => {
    const parts = data.tables.filter((section) => section.number === number);
    const title = parts.find((section) => section.name === number)?.title ?? parts[0].title;
    const element = h("section", { id: number, "aria-labelledby": `${number}-title` },
      h("h2", { id: `${number}-title` }, `${tableName(number)}: ${title}`), parts.map(sectionElement));
    rowFilters.push(() => { element.hidden = [...element.querySelectorAll(":scope > article")].every((article) => article.hidden); });
    return element;
  }));
}

function drawContents() {
  const titles = new Map(data.tables.filter((s) => s.name === s.number).map((s) => [s.number, s.title]));
  for (const section of data.tables) if (!titles.has(section.number)) titles.set(section.number, section.title);
  const entry = (id, text, about) => h("li", {}, h("a", { href: `#${id}` }, text, about && h("span.about", {}, about)));
  byId("contents").replaceChildren(h("ul", {}, entry("overview", "Overview"), entry("claims", "Claims"),
    [...titles].map(([number, title]) => entry(number, tableName(number), title)), entry("records", "Records")));
}

function drawOverview() {
  const states = new Map();
  for (const record of data.records) states.set(record.status, (states.get(record.status) ?? 0) + 1);
  const tile = (value, ...text) => h("li", {}, h("strong", {}, `${value.toLocaleString("en")}`), text);
  const done = states.get("done") ?? 0;
  const others = [...states].filter(([state]) => state !== "done").map(([state, n]) => `${n} ${state}`).join(", ");
  const tiles = [tile(data.records.length, `${data.records.length === 1 ? "record" : "records"}: ${done} done${others ? `, ${others}` : ""}`), tile(new Set(data.tables.map((s) => s.number)).size, "tables with records")];
  if (data.claims) for (const [verdict, n] of Object.entries(data.claims.counts)) tiles.push(tile(n, `claims ${verdict}`));
  const scales = [...new Set([...data.tables, ...data.absent].map((s) => s.scale))].sort((a, b) => ORDER.indexOf(a) - ORDER.indexOf(b));
  const names = [...new Set([...data.tables.map((s) => [s.number, s]), ...data.absent.map((s) => [s.name, s])].map(([name]) => name))].sort(collator.compare);
  const rows = names.map((name) => ({
    name,
    title: (data.tables.find((s) => s.name === name) ?? data.absent.find((s) => s.name === name) ?? data.tables.find((s) => s.number === name)).title,
    at: Object.fromEntries(scales.map((scale) => [scale, data.tables.find((s) => s.number === name && s.scale === scale) ?? data.absent.find((s) => s.name === name && s.scale === scale)])),
  }));
  const state = (row, scale) => {
    const found = row.at[scale];
    if (!found) return "";
    if (!found.id) return h("span.soft", { title: found.command }, "not run");
    return h("a", { href: `#${found.id}` }, found.measured ? "measured" : `${found.recorded} of ${found.planned}`);
  };
  const table = new SortedTable({
    label: "What has been run: cells with a record, of those planned",
    rows,
    columns: [
      { title: "table", draw: (row) => [tableName(row.name), h("small", {}, row.title)], sort: (row) => row.name },
      ...scales.map((scale) => ({ title: scale, draw: (row) => state(row, scale), sort: (row) => (row.at[scale]?.id ? (row.at[scale].planned ? row.at[scale].recorded / row.at[scale].planned : 1) : null) })),
    ],
  });
  byId("overview").replaceChildren(
    h("h1", { id: "overview-title" }, "Kronecker adapters: what the records say"),
    h("p", {}, "Every number here comes from a record in this results directory. Press a number, or the name of its row, to see which records, and the command that made them."),
    h("ul.tiles", {}, tiles),
    names.length ? table.element : null,
    data.records.length || data.tables.length ? null : h("p.empty", {}, "There are no records yet. ", h("code", {}, "make reproduce-table2"), " makes the first ones; then ", h("code", {}, "make dashboard"), " again."));
}

const ORDER = ["smoke", "mini", "small", "paper"];

// ------------------------------------------------------------------------------------------------------ claims

const SIGNS = { supported: "✓", contradicted: "✕", undecided: "~", "not run here": "–" };

function verdictBadge(verdict) {
  return h(`span.badge.${verdict === "not run here" ? "absent" : verdict}`, {}, `${SIGNS[verdict] ?? ""} ${verdict}`);
}

function drawClaims() {
  const place = byId("claims");
  const title = h("h2", { id: "claims-title" }, "The papers' claims");
  if (!data.claims) {
    place.replaceChildren(title, h("p.empty", {}, "No verdicts yet: ", h("code", {}, "make claims"), " judges the claims from the records; then ", h("code", {}, "make dashboard"), " again."));
    return;
  }
  const elements = data.claims.claims.map((claim) => {
    const deciding = claim.evidence.filter((line) => line.decides && line.text);
    const shown = deciding.length ? deciding : claim.evidence.filter((line) => line.text);
    const said = (line) => [line.text, line.table && `(${tableName(line.table)}, ${line.scale}${line.repeated ? `, ${line.repeated}` : ""})`].filter(Boolean).join(" ");
    const element = h("article.claim", { id: `claim-${claim.key}` },
      h("p", {}, verdictBadge(claim.verdict), h("span.soft", {}, ` ${claim.paper}, ${claim.source} [${claim.confidence}]`)),
      h("p.said", {}, claim.claim),
      claim.why && h("p.effects", {}, `Why no clearer: ${claim.why}.`),
      shown.slice(0, 3).map((line) => h("p.effects", {}, said(line))),
      shown.length > 3 ? h("p.effects", {}, `and ${shown.length - 3} more below`) : null,
      lazy(`${count(claim.evidence.length, "test")}`, () => claimTable(claim)));
    element.dataset.text = [claim.claim, claim.paper, claim.verdict, claim.source].join(" ").toLowerCase();
    return element;
  });
  const nothing = h("p.empty", { hidden: true }, "No claim has this text.");
  rowFilters.push((wanted) => {
    for (const element of elements) element.hidden = !wanted.words.every((word) => element.dataset.text.includes(word));
    nothing.hidden = elements.some((element) => !element.hidden);
  });
  const counts = Object.entries(data.claims.counts).map(([verdict, n]) => `${n} ${verdict}`).join(", ");
  place.replaceChildren(title, h("p.soft", {}, `Of ${data.claims.claims.length}: ${counts}. A verdict is computed from intervals, and is one on the models and scales named with it. The effect of a metric is a gain: positive is better for the method named first.`), ...elements, nothing);
}

function claimTable(claim) {
  const where = (line) => (line.table ? `${tableName(line.table)}, ${line.scale}` : "computed");
  const target = (line) => data.tables.find((s) => s.name === line.table && s.scale === line.scale);
  return new SortedTable({
    label: "Tests of this claim",
    rows: claim.evidence,
    columns: [
      { title: "test", draw: (line) => line.told, sort: (line) => line.told },
      { title: "where", draw: (line) => (target(line) ? h("a", { href: `#${target(line).id}` }, where(line)) : where(line)), sort: where },
      { title: "effect, 95 % interval", right: true, draw: (line) => line.text, sort: (line) => line.effect },
      { title: "of", draw: (line) => [line.repeated, line.interval_over && `interval over ${line.interval_over}`].filter(Boolean).join(", "), sort: (line) => line.count },
      { title: "says", draw: (line) => [verdictBadge(line.verdict), h("span.where", {}, [line.reason, line.said].filter(Boolean).join("; "))], sort: (line) => line.verdict },
      { title: "again", draw: (line) => (line.command ? h("code", {}, line.command) : ""), sort: (line) => line.command },
    ],
  }).element;
}

/** A disclosure whose content is made when it is opened first. */
function lazy(summary, make) {
  const element = h("details", {}, h("summary", {}, summary));
  element.addEventListener("toggle", () => { if (element.open && element.childElementCount === 1) element.append(make()); });
  return element;
}

// ----------------------------------------------------------------------------------------------------- records

function drawRecords() {
  const first = (record) => Object.entries(record.metrics)[0];
  const table = new SortedTable({
    label: "Records",
    rows: data.records,
    limit: 50,
    columns: [
      { title: "record", draw: (r) => [h("button.row", { type: "button", onclick: () => openRecord(r) }, r.label), h("small", {}, [r.scale, r.seed == null ? "no seed" : `seed ${r.seed}`, r.id].join(" · "))], sort: (r) => r.label },
      { title: "model", draw: (r) => r.model, sort: (r) => r.model },
      { title: "task", draw: (r) => r.task, sort: (r) => r.task },
      { title: "status", draw: (r) => (r.status === "done" ? "done" : h(`span.badge.${r.status === "failed" || r.status === "diverged" ? r.status : "absent"}`, {}, r.status)), sort: (r) => r.status },
      { title: "first metric, as recorded", right: true, draw: (r) => (first(r) ? [`${number(first(r)[1][0])}`, first(r)[1][1] == null ? "" : h("span.spread", {}, ` ± ${number(first(r)[1][1], 2)}`), h("span.where", {}, first(r)[0])] : ""), sort: (r) => first(r)?.[1][0] },
      ...costColumns,
      { title: "finished (UTC)", draw: (r) => (r.finished ?? "").slice(0, 16).replace("T", " "), sort: (r) => r.finished },
      { title: "file", draw: recordLink, sort: (r) => r.id },
    ],
  });
  const nothing = h("p.empty", { hidden: data.records.length > 0 }, "No record.");
  rowFilters.push((wanted) => {
    const shown = table.filter(wanted.record);
    table.element.hidden = shown === 0;
    nothing.hidden = shown > 0;
    return [0, 0, shown];
  });
  byId("records").replaceChildren(h("h2", { id: "records-title" }, "Records"), h("p.soft", {}, "One record is one experiment: a model, a method, a task, a recipe and a seed. Metrics are as recorded: shares between 0 and 1, likelihoods in nats."), table.element, nothing);
}

// ----------------------------------------------------------------------------------------------------- filters

function drawFilters() {
  const options = (values) => [...new Set(values)].filter(Boolean).sort(collator.compare);
  const choices = {
    scale: ORDER.filter((scale) => data.tables.some((s) => s.scale === scale) || data.records.some((r) => r.scale === scale)),
    method: options([...data.records.map((r) => r.method), ...data.tables.flatMap((s) => s.rows.flatMap((row) => row.methods))]),
    model: options(data.records.map((r) => r.model)),
    task: options([...data.records.map((r) => r.task), ...data.tables.flatMap((s) => s.rows.flatMap((row) => row.tasks))]),
  };
  const form = byId("filters");
  const text = h("input", { type: "search", id: "filter-text", placeholder: "a method, a table, a record's id", autocomplete: "off" });
  const selects = Object.fromEntries(Object.entries(choices).map(([name, values]) => [name, h("select", { id: `filter-${name}` }, h("option", { value: "" }, "all"), values.map((value) => h("option", { value }, value)))]));
  const status = h("span", { role: "status", id: "shown" });
  form.replaceChildren(
    h("label.wide", { for: "filter-text" }, "text", text),
    ...Object.entries(selects).map(([name, select]) => h("label", { for: select.id }, name, select)),
    h("div.end", {}, h("button.quiet", { type: "reset" }, "Clear"), status));

  const apply = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = Object.fromEntries(Object.entries(selects).map(([name, select]) => [name, select.value]));
    const has = (value, among) => !value || among.includes(value);
    const wanted = {
      words,
      row: (section, row) =>
        has(chosen.scale, [section.scale]) && has(chosen.method, row.methods) && has(chosen.model, row.models) &&
        has(chosen.task, [...row.tasks, ...row.records.map((place) => data.records[place].task)]) &&
        words.every((word) => rowText(section, row).includes(word)),
      record: (record) =>
        has(chosen.scale, [record.scale]) && has(chosen.method, [record.method]) && has(chosen.model, [record.model]) &&
        has(chosen.task, [record.task, ...record.task.split(" → ")]) && words.every((word) => recordText(record).includes(word)),
    };
    let [rows, of, records] = [0, 0, 0];
    for (const filter of rowFilters) {
      const [shown = 0, all = 0, found = 0] = filter(wanted) ?? [];
      rows += shown; of += all; records += found;
    }
    status.textContent = `${rows.toLocaleString("en")} of ${count(of, "row")} and ${records.toLocaleString("en")} of ${count(data.records.length, "record")} shown`;
  };
  let waiting;
  form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(apply, 120); });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  apply();
}

const texts = new Map();
function remembered(key, make) {
  if (!texts.has(key)) texts.set(key, make().join(" ").toLowerCase());
  return texts.get(key);
}
const rowText = (section, row) => remembered(row, () => [tableName(section.name), section.name, section.title, section.scale, row.label, row.group, row.key, ...row.methods, ...row.models, ...row.tasks, ...row.records.map((place) => data.records[place].id)]);
const recordText = (record) => remembered(record, () => [record.id, record.label, record.scale, record.method, record.model, record.task, record.status, `seed ${record.seed}`]);

// ------------------------------------------------------------------------------------------------------ charts

// Hues of the figures and their counterparts with enough contrast on the surface of each theme.
const HUES = {
  light: { "#E69F00": "#a66f00", "#56B4E9": "#2a83bd", "#009E73": "#008562", "#CC79A7": "#b0558a", "#D55E00": "#c65300" },
  dark: { "#000000": "#f4f2ee", "#767676": "#9aa1a8", "#0072B2": "#4aa3df", "#009E73": "#2fbf94", "#D55E00": "#ff8a4c", "#E69F00": "#f0b232", "#CC79A7": "#e09cc4" },
};
const SHAPES = {
  circle: "M4,0A4,4,0,1,1,-4,0A4,4,0,1,1,4,0Z", square: "M-4,-4H4V4H-4Z", diamond: "M0,-5L4.5,0L0,5L-4.5,0Z", cross: "M-1.6,-4.8H1.6V-1.6H4.8V1.6H1.6V4.8H-1.6V1.6H-4.8V-1.6H-1.6Z",
  "triangle-up": "M0,-4.6L4.6,4H-4.6Z", "triangle-down": "M0,4.6L4.6,-4H-4.6Z", "triangle-left": "M-4.6,0L4,-4.6V4.6Z", "triangle-right": "M4.6,0L-4,-4.6V4.6Z", stroke: "M-5,0H5",
};
const dark = () => document.documentElement.dataset.theme === "dark";
const paint = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const hue = (colour) => HUES[dark() ? "dark" : "light"][colour] ?? colour;

/** The specification with the colours of the theme in it. */
function themed(value) {
  if (typeof value === "string") return value.startsWith("$") ? paint(value.slice(1)) : value.startsWith("#") ? hue(value) : value;
  if (Array.isArray(value)) return value.map(themed);
  if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, themed(inner)]));
  return value;
}

const chartConfig = () => ({
  background: null,
  font: "system-ui, sans-serif",
  view: { stroke: null },
  axis: { labelColor: paint("soft"), titleColor: paint("soft"), gridColor: paint("line"), domainColor: paint("edge"), tickColor: paint("edge"), labelFontSize: 11, titleFontSize: 11, titleFontWeight: "normal", titlePadding: 8 },
});

const drawn = new Map(); // canvas -> what draws it again

function legendMark(series, lined) {
  const svg = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const mark = svg("svg", { width: lined ? 26 : 14, height: 12, viewBox: lined ? "-13 -6 26 12" : "-7 -6 14 12", "aria-hidden": "true" });
  const colour = hue(series.colour);
  if (lined) mark.append(svg("path", { d: "M-13,0H13", stroke: colour, "stroke-width": 2, "stroke-dasharray": series.dash.join(" ") }));
  else mark.append(svg("path", { d: SHAPES[series.shape], fill: colour, stroke: colour }));
  return mark;
}

function figure(section, chart) {
  const views = [];
  const lined = chart.kind === "loss" || chart.kind === "lines";
  const legend = h("ul.legend", { "aria-label": "Legend; press a name to bring it out" });
  let pressed = "";
  const light = (id) => { for (const view of views) view.signal("lit", id).runAsync(); };
  const drawLegend = () => legend.replaceChildren(...chart.series.map((series) => {
    const button = h("button", {
      type: "button", "aria-pressed": `${series.id === pressed}`,
      onclick: () => { pressed = pressed === series.id ? "" : series.id; light(pressed); for (const other of legend.querySelectorAll("button")) other.setAttribute("aria-pressed", `${other === button && pressed !== ""}`); },
      onpointerenter: () => light(series.id), onpointerleave: () => light(pressed),
    }, legendMark(series, lined), series.label);
    return h("li", {}, button);
  }));
  const named = chart.kind === "forest" || chart.kind === "kept"; // the axis names the rows
  const panels = chart.panels.map((panel) => {
    const canvas = h("div.canvas");
    canvas.draw = async () => {
      const old = views.findIndex((view) => view.container() === canvas || canvas.contains(view.container()));
      if (old >= 0) views.splice(old, 1)[0].finalize();
      const points = chart.points.filter((point) => !point.panel || point.panel === panel.title);
      const spec = { ...themed(panel.spec), datasets: { points } };
      const { view } = await window.vegaEmbed(canvas, spec, { mode: "vega-lite", renderer: "svg", actions: false, ast: true, logLevel: 1, config: chartConfig(), tooltip: { theme: "custom" } });
      views.push(view);
      view.addEventListener("click", (_, item) => {
        const row = section.rows.find((candidate) => candidate.key === item?.datum?.key);
        if (row) openNumber(section, row);
      });
      if (pressed) view.signal("lit", pressed).runAsync();
    };
    return [canvas, h("div.panel", {}, panel.title && h("p", {}, panel.title), canvas)];
  });
  if (!named) drawLegend();
  const element = h("figure", { "data-chart": chart.name },
    h("figcaption", {}, h("strong", {}, chart.title), h("span", {}, chart.caption)),
    h("div.drawing", {}, h(`div.panels${panels.length === 1 ? ".one" : named ? ".wide" : ""}`, {}, panels.map(([, box]) => box)), named ? null : legend),
    lazy(`The ${count(chart.points.filter((point) => point.kind !== "front").length, "point")} as numbers`, () => pointTable(section, chart)));
  element.draw = async () => {
    if (!named) drawLegend();
    for (const [canvas] of panels) await canvas.draw();
  };
  return element;
}

function pointTable(section, chart) {
  const byRecord = new Map(data.records.map((record) => [`${record.scale}/${record.id}`, record]));
  const rows = chart.points.filter((point) => point.kind !== "front");
  const right = (title, field, digits = 5) => ({ title, right: true, draw: (p) => number(p[field], digits), sort: (p) => p[field] });
  return new SortedTable({
    label: `${chart.title}; scale ${section.scale}`,
    rows,
    limit: MORE,
    columns: [
      { title: "row", draw: (p) => [p.name, h("small", {}, `${section.scale} · ${p.seed == null ? count(p.seeds, "seed") : `seed ${p.seed}`}`)], sort: (p) => p.name },
      ...(rows.some((p) => p.panel) ? [{ title: "panel", draw: (p) => p.panel ?? "", sort: (p) => p.panel }] : []),
      ...(chart.x ? [right(chart.x, "x")] : []),
      right(chart.y, "value"), right("from", "low"), right("to", "high"),
      { title: "interval over", draw: (p) => p.how ?? "", sort: (p) => p.how },
      { title: "record", draw: (p) => (byRecord.has(`${section.scale}/${p.record}`) ? recordLink(byRecord.get(`${section.scale}/${p.record}`)) : section.measured ? link(`${data.results}/${section.measured.path}`) : "mean of the seeds"), sort: (p) => p.record },
    ],
  }).element;
}

/** Charts are drawn when they come near the window. */
function watchCharts() {
  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      seen.unobserve(target);
      target.draw();
      drawn.set(target, true);
    }
  }, { rootMargin: "300px" });
  for (const element of document.querySelectorAll("figure[data-chart]")) seen.observe(element);
}

// ------------------------------------------------------------------------------------------------------- theme

const system = matchMedia("(prefers-color-scheme: dark)");
const THEMES = ["system", "light", "dark"];
let theme = "system";
try { theme = THEMES.includes(localStorage.getItem("kronlab-theme")) ? localStorage.getItem("kronlab-theme") : "system"; } catch { /* a browser may keep nothing of files */ }

function setTheme(next) {
  theme = next;
  document.documentElement.dataset.theme = theme === "system" ? (system.matches ? "dark" : "light") : theme;
  byId("theme").textContent = `Theme: ${theme}`;
  for (const element of drawn.keys()) element.draw();
}

byId("theme").addEventListener("click", () => {
  setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]);
  try { localStorage.setItem("kronlab-theme", theme); } catch { /* as above */ }
});
system.addEventListener("change", () => setTheme(theme));

/** The entry of the contents for the section in view is marked. */
function watchSections() {
  const links = new Map([...document.querySelectorAll("#contents a")].map((a) => [a.hash.slice(1), a]));
  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting || !links.has(target.id)) continue;
      for (const a of links.values()) a.removeAttribute("aria-current");
      links.get(target.id).setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -75% 0px" });
  for (const section of document.querySelectorAll("main section")) seen.observe(section);
}

setTheme(theme);
drawContents();
drawOverview();
drawClaims();
drawTables();
drawRecords();
drawFilters();
watchSections();
addEventListener("DOMContentLoaded", watchCharts); // when the plotting library, which stands below, has been read
if (location.hash.length > 1) byId(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();

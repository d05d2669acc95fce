// The list of runs.

import { call } from "./api.js";
import { day, h, number, pill, tell } from "./dom.js";

const EVERY_MS = 3000;

export async function showRuns(body) {
  const place = h("div", {});
  body.append(h("h1", {}, "Runs"), place);
  const load = async () => place.replaceChildren(table(await call("GET", "v1/runs")));
  await load();
  const timer = setInterval(() => load().catch((error) => tell(error.message)), EVERY_MS);
  return () => clearInterval(timer);
}

function table(runs) {
  if (!runs.length) {
    return h("div", { class: "card" }, h("p", {}, "There is no run yet."),
      h("p", {}, h("a", { href: "#/new" }, "Make one")));
  }
  const rows = [...runs].reverse().map((run) => {
    const state = run.paused && !run.finished_at ? "paused" : run.status;
    return h("tr", {},
      h("td", {}, h("a", { href: `#/run/${run.id}` }, run.settings.name),
        h("div", { class: "soft small" }, run.id)),
      h("td", {}, pill(state)),
      number(`${run.round} of ${run.plan.federation.rounds}`),
      h("td", { class: "number wide" }, String(run.participants)),
      h("td", { class: "wide" }, day(run.created_at)));
  });
  return h("div", { class: "card scroll" }, h("table", {},
    h("thead", {}, h("tr", {}, h("th", {}, "Run"), h("th", {}, "State"),
      h("th", { class: "number" }, "Round"), h("th", { class: "number wide" }, "Devices"),
      h("th", { class: "wide" }, "Created"))),
    h("tbody", {}, rows)));
}

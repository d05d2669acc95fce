// One run: what it waits for, its devices, its rounds, and what can be done with it.

import { call, run as path } from "./api.js";
import { bars, lines, matrix } from "./chart.js";
import { devices } from "./devices.js";
import { agreed, card, clock, h, megabytes, percent, pill, tell } from "./dom.js";
import { invitation } from "./invitation.js";
import { PHASES, sentence } from "./words.js";

const SHOWN_EVENTS = 200;

export async function showRun(body, id) {
  const view = new View(id, await call("GET", path(id)), await call("GET", `${path(id)}/status`));
  body.append(...view.parts());
  await view.loadResults();
  view.follow();
  return () => view.stop();
}

class View {
  constructor(id, run, state) {
    Object.assign(this, { id, run, state, events: [], timer: null, source: null, shownRound: null });
    this.place = {};
    for (const name of ["top", "devices", "accuracy", "loss", "bytes", "engine", "quality",
      "events"]) this.place[name] = h("div", {});
  }

  parts() {
    const { place } = this;
    this.showState();
    return [place.top, card("Devices", place.devices), h("div", { class: "grid broad" },
      card("Accuracy on held-out images", place.accuracy), card("Loss", place.loss),
      card("Data sent", place.bytes), invitation(this.id, this.state.status)),
    place.quality,
    h("div", { class: "grid" }, card("What happened", place.events),
      card("The server's work", place.engine))];
  }

  // Follow the server's events; the browser connects again by itself.
  follow() {
    this.source = new EventSource(`${path(this.id)}/stream`);
    this.source.onmessage = (message) => {
      this.events.push(JSON.parse(message.data));
      this.showEvents();
      this.timer ??= setTimeout(() => { // one request for all events of this time
        this.timer = null;
        this.loadResults().catch((error) => tell(error.message));
      }, 300);
    };
    this.source.addEventListener("status", (message) => {
      this.state = JSON.parse(message.data);
      this.showState();
    });
    this.source.addEventListener("over", () => this.source.close());
    this.source.addEventListener("deleted", () => { location.hash = "#/"; });
  }

  stop() {
    this.source?.close();
    clearTimeout(this.timer);
  }

  async loadResults() {
    const results = await call("GET", `${path(this.id)}/results`);
    const closed = results.rounds.filter((round) => round.accuracy != null);
    const newest = closed.at(-1)?.round;
    if (newest !== undefined && newest !== this.shownRound) {
      this.evaluation = await call("GET", `${path(this.id)}/rounds/${newest}/evaluation`);
      this.shownRound = newest;
      this.showQuality();
    }
    this.showResults(results, closed);
  }

  showState() {
    const { state } = this;
    const over = ["finished", "cancelled", "failed"].includes(state.status);
    const kind = state.paused && !over ? "paused" : state.status;
    const until = state.closes_at
      && h("p", { class: "soft" }, `It goes on without those that are missing at ${
        clock(state.closes_at)}.`);
    const focused = document.activeElement?.dataset?.action;
    this.place.top.replaceChildren(
      h("h1", {}, state.name, " ", pill(kind)),
      h("p", { class: "soft small" }, `${state.id} · round ${state.round} of ${state.rounds}`),
      h("progress", { max: state.rounds, value: state.round, "aria-label": "Rounds" }),
      h("p", { class: "summary", role: "status" }, state.summary), until || "",
      this.buttons(over));
    if (focused) this.place.top.querySelector(`[data-action="${focused}"]`)?.focus();
    this.place.devices.replaceChildren(devices(state, over, (device) => this.remove(device)));
    const work = state.engine;
    this.place.engine.replaceChildren(h("p", {}, work.tasks
      ? `${work.samples} images through the model since the server started, in batches of `
        + `${work.batch_samples} on average; ${work.compute_s.toFixed(1)} s of computing, and each `
        + `request waited ${Math.round(work.wait_ms)} ms for its turn.`
      : "Nothing has been computed for this run since the server started."));
  }

  buttons(over) {
    const { state } = this;
    const button = (name, action, attributes = {}) => h("button", { type: "button",
      "data-action": name, onclick: action, ...attributes }, name);
    const steer = (what, said) => this.act("POST", `${path(this.id)}/${what}`, said);
    const list = over
      ? [button("Delete", () => this.delete(), { class: "danger" })]
      : [state.paused ? button("Resume", () => steer("resume", "The run goes on."))
        : button("Pause", () => steer("pause", "The open round ends; then the run pauses.")),
      button("Close the round now", () => steer("close-round", "The round is closed."),
        { disabled: !state.phase }),
      button("Cancel", () => this.cancel(), { class: "danger" })];
    if (state.round > 0) {
      list.unshift(h("a", { class: "button", href: `${path(this.id)}/model`, download: "",
        "data-action": "model" }, "Download the model"));
    }
    return h("div", { class: "buttons" }, list);
  }

  async act(method, where, said) {
    try {
      await call(method, where);
      tell(said, true);
      return true;
    } catch (error) {
      tell(error.message);
      return false;
    }
  }

  async cancel() {
    if (await agreed(`Stop ${this.state.name} for good? Its model so far stays.`, "Cancel the run")) {
      await this.act("POST", `${path(this.id)}/cancel`, "The run is cancelled.");
    }
  }

  async delete() {
    if (await agreed(`Delete ${this.state.name} with its model and history?`, "Delete the run")
      && await this.act("DELETE", path(this.id), "The run is deleted.")) location.hash = "#/";
  }

  async remove(device) {
    if (await agreed(`Remove ${device.name}? It cannot come back.`, "Remove the device")) {
      await this.act("DELETE", `${path(this.id)}/participants/${device.id}`,
        `${device.name} is removed.`);
    }
  }

  showResults(results, closed) {
    const start = closed.find((round) => round.round === 0);
    const majority = this.evaluation?.quality?.majority;
    const kept = results.rounds.filter((round) => round.train_loss != null);
    const point = (name) => (round) => ({ round: round.round, value: round[name] });
    this.place.accuracy.replaceChildren(lines({
      points: closed.map(point("accuracy")), show: percent, top: 1,
      levels: [start && { name: "closed-form start", value: start.accuracy },
        majority != null && { name: "always the largest class", value: majority }].filter(Boolean),
      label: closed.length ? `Accuracy, last ${percent(closed.at(-1).accuracy)}` : "Accuracy",
    }));
    this.place.loss.replaceChildren(lines({
      points: closed.filter((round) => round.evaluation_loss != null).map(point("evaluation_loss")),
      second: kept.map(point("train_loss")), show: (value) => value.toFixed(2),
      label: "Loss over rounds",
    }), kept.length ? h("p", { class: "soft small" }, "solid: held-out images; dashed: training")
      : "");
    this.place.bytes.replaceChildren(...this.bytes(results));
  }

  bytes(results) {
    const rows = Object.entries(results.traffic).map(([phase, both]) =>
      [PHASES[phase] ?? phase, both.up + both.down, `f-${phase}`]);
    const total = rows.reduce((sum, [, bytes]) => sum + bytes, 0);
    const trained = results.rounds.reduce((sum, round) => sum + round.updated.length, 0);
    const full = 2 * this.run.backbone_bytes * trained;
    if (!total) return [h("p", { class: "soft" }, "No device has sent anything yet.")];
    const parts = [bars(rows)];
    if (full) {
      parts.push(h("p", {}, `In all ${megabytes(total)}: ${percent(total / full)} of federated `
        + "full fine-tuning in as many rounds, which sends the whole model both ways:"),
      bars([["this run", total, "f-smashed"], ["full fine-tuning", full, "f-full"]], full));
    }
    return parts;
  }

  showQuality() {
    const { classes, confusion, devices: each, quality, round } = this.evaluation;
    if (!quality) return;
    const figure = (name, value) => (value == null ? [] : [`${name} ${percent(value)}`]);
    const parts = [h("p", {}, [`${quality.samples} held-out images after round ${round}`,
      ...figure("balanced accuracy", quality.balanced_accuracy),
      ...figure("macro F1", quality.macro_f1),
      ...figure("calibration error", quality.calibration_error)].join(" · ")),
    h("p", {}, each.map((device) =>
      `${device.name}: ${percent(device.quality.accuracy)} of ${device.quality.samples}`).join(" · "))];
    if (confusion.length && classes.length <= 20) parts.push(matrix(classes, confusion));
    this.place.quality.replaceChildren(card("Which class is taken for which", ...parts));
  }

  showEvents() {
    const names = new Map(this.state.devices.map((device) => [device.id, device.name]));
    const items = this.events.slice(-SHOWN_EVENTS).reverse().flatMap((event) => {
      const text = sentence(event, names);
      return text ? [h("li", {}, h("time", {}, clock(event.at)), text)] : [];
    });
    this.place.events.replaceChildren(h("ol", { class: "events", tabindex: "0",
      "aria-label": "Events, the newest first" }, items));
  }
}

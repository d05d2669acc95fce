// The server's words in those of a person who runs it.

import { percent } from "./dom.js";

export const PHASES = {
  download: "first part of the model, once",
  smashed: "images as features of that part",
  features: "features back to the devices",
  gradients: "training steps",
  updates: "trained classifiers",
  inference: "evaluation",
  control: "requests and waiting",
};

const KINDS = {
  run_created: () => "the run was created",
  participant_joined: (data) => `${data.name} joined`,
  participant_left: (data) => `${data.name} left`,
  participant_ended: (data) => `${data.name} ended: ${data.reason}`,
  participant_removed: (data) => `${data.name} was removed`,
  participant_silent: (data) => `${data.name} has fallen silent`,
  participant_returned: (data) => `${data.name} is back`,
  round_opened: (data) => `round ${data.round} began with ${count(data.sampled, "device")}`,
  update_counted: (data) => `${data.name} sent its update of round ${data.round}`,
  update_refused: (data) => `the update of ${data.name} was refused: ${words(data.code)}`,
  state_aggregated: (data) => `round ${data.round}: averaged ${count(data.updates, "update")}`,
  evaluation_counted: (data) => `${data.name} evaluated round ${data.round}: ${data.correct} of `
    + `${data.samples} right`,
  round_closed: (data) => `round ${data.round} is closed`
    + (data.accuracy == null ? "" : `: accuracy ${percent(data.accuracy)}`),
  round_repeated: (data) => `round ${data.round} is repeated: ${data.reason ?? "too few updates"}`,
  round_closing: (data) => `you closed the ${data.phase} of round ${data.round}`,
  run_paused: () => "the run was paused",
  run_resumed: () => "the run goes on",
  run_finished: () => "the run is finished",
  run_cancelled: () => "the run was cancelled",
  run_failed: (data) => `the run failed: ${data.reason}`,
};

const words = (code) => String(code).replaceAll("_", " ");

function count(what, name) {
  const number = Array.isArray(what) ? what.length : what;
  return `${number} ${name}${number === 1 ? "" : "s"}`;
}

// Say an event in one line; null: it is of no interest here.
export function sentence(event, names) {
  if (event.kind === "engine") return null;
  const { participant } = event.data;
  const data = { ...event.data, name: event.data.name ?? names.get(participant) ?? participant };
  return KINDS[event.kind]?.(data) ?? words(event.kind);
}

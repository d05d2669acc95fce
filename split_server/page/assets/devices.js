// The table of a run's devices.

import { clock, h, megabytes, pill } from "./dom.js";

export function devices(state, over, remove) {
  if (!state.devices.length) return h("p", { class: "soft" }, "No device has joined yet.");
  const rows = state.devices.map((device) => {
    const here = !over && !["gone", "removed"].includes(device.status);
    const heard = device.heard_at == null ? "–" : clock(device.heard_at);
    const said = device.status === "silent" && device.heard_at != null
      ? `silent since ${heard}` : device.status;
    return h("tr", {}, h("th", { scope: "row" }, device.name),
      h("td", {}, pill(said, device.status)),
      h("td", { class: "wide" }, heard),
      h("td", { class: "number wide" }, String(device.train_samples + device.test_samples)),
      h("td", { class: "number wide" }, megabytes(device.up)),
      h("td", { class: "number wide" }, megabytes(device.down)),
      h("td", { class: "number" }, here && h("button", { type: "button", class: "tiny danger",
        "aria-label": `Remove ${device.name}`, onclick: () => remove(device) }, "Remove")));
  });
  return h("div", { class: "scroll" }, h("table", {},
    h("thead", {}, h("tr", {}, h("th", {}, "Device"), h("th", {}, "State"),
      h("th", { class: "wide" }, "Last heard"), h("th", { class: "number wide" }, "Images"),
      h("th", { class: "number wide" }, "Sent"), h("th", { class: "number wide" }, "Received"),
      h("th", {}))),
    h("tbody", {}, rows)));
}

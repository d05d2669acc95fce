// The command with which another device joins, to copy or to scan.

import { call, run as path } from "./api.js";
import { qrCode } from "./chart.js";
import { card, h, tell } from "./dom.js";

export function invitation(id, status) {
  const place = h("div", {}, h("p", { class: "soft" },
    "The command holds the join token: show it only to those who may join."));
  const button = h("button", { type: "button" }, "Show the command");
  button.addEventListener("click", async () => {
    const here = (location.origin + location.pathname).replace(/\/$/, "");
    try {
      const answer = await call("GET", `${path(id)}/invitation?url=${encodeURIComponent(here)}`);
      const command = h("code", { class: "command" }, answer.command);
      const copy = h("button", { type: "button", onclick: () => copyText(command) }, "Copy");
      place.replaceChildren(command, h("div", { class: "buttons" }, copy), qrCode(answer.code));
    } catch (error) {
      tell(error.message);
    }
  });
  if (["finished", "cancelled", "failed"].includes(status)) button.disabled = true;
  place.append(button);
  return card("Join a device", place);
}

async function copyText(element) {
  try {
    await navigator.clipboard.writeText(element.textContent); // needs https, or this machine
    tell("The command is copied.", true);
  } catch {
    getSelection().selectAllChildren(element);
    tell("The command is selected; copy it with Ctrl-C.", true);
  }
}

// Makes a run, from a small form or from settings in TOML.

import { call } from "./api.js";
import { h, tell } from "./dom.js";

export async function showNew(body) {
  const field = (id, label, attributes) => [h("label", { for: id }, label),
    h("input", { id, required: true, ...attributes })];
  const simple = h("form", { class: "card", "aria-label": "Small form" },
    h("h2", {}, "A few words"),
    field("name", "Name of the run", { value: "run", autofocus: true }),
    field("classes", "Classes: the names of the image folders, with commas",
      { placeholder: "cat, dog" }),
    field("devices", "Devices to wait for", { type: "number", min: 1, value: 2 }),
    field("rounds", "Rounds", { type: "number", min: 1, value: 8 }),
    field("size", "Image size in pixels", { type: "number", min: 14, step: 14, value: 56 }),
    h("div", { class: "buttons" }, h("button", { class: "main" }, "Create the run")));
  const toml = h("textarea", { id: "toml", spellcheck: "false", required: true });
  const file = h("input", { id: "file", type: "file", accept: ".toml" });
  file.addEventListener("change", async () => {
    if (file.files[0]) toml.value = await file.files[0].text();
  });
  const full = h("form", { class: "card", "aria-label": "Settings in TOML" },
    h("h2", {}, "Settings in TOML"),
    h("label", { for: "file" }, "Read a file"), file,
    h("label", { for: "toml" }, "Or paste, as split-server init writes them"), toml,
    h("div", { class: "buttons" }, h("button", { class: "main" }, "Create the run")));
  const value = (id) => simple.querySelector(`#${id}`).value;
  const submit = (form, text) => form.addEventListener("submit", (event) => {
    event.preventDefault();
    create(form, text());
  });
  submit(simple, () => written(value));
  submit(full, () => toml.value);
  body.append(h("h1", {}, "New run"), h("div", { class: "grid" }, simple, full));
  return () => {};
}

// Write the answers of the form as TOML; a JSON string is one of TOML, too.
function written(value) {
  const classes = value("classes").split(",").map((name) => name.trim()).filter(Boolean);
  return [
    `name = ${JSON.stringify(value("name"))}`,
    `class_names = ${JSON.stringify(classes)}`,
    "[model]",
    `num_classes = ${classes.length}`,
    `image_size = ${Number(value("size"))}`,
    'weights = "packaged"',
    "[federation]",
    `rounds = ${Number(value("rounds"))}`,
    `min_participants = ${Number(value("devices"))}`,
  ].join("\n");
}

async function create(form, toml) {
  const button = form.querySelector("button");
  button.disabled = true;
  button.textContent = "The server prepares the model …";
  try {
    const settings = await call("POST", "v1/settings", { toml });
    const run = await call("POST", "v1/runs", settings);
    location.hash = `#/run/${run.id}`;
  } catch (error) {
    tell(error.message);
    button.disabled = false;
    button.textContent = "Create the run";
  }
}

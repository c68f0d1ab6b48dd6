// Reads a JSON list of objects, checks each against the types that the operator's own package has for its kind, and writes one
// line for each fault. Those types let unknown keys pass, so what they never look at is a fault too.
"use strict";
const { createRequire } = require("node:module");
const { readFileSync } = require("node:fs");
const load = createRequire(process.argv[2] + "/package.json");

const PACKAGES = {
  "keda.sh/v1alpha1": "@kubernetes-models/keda/keda.sh/v1alpha1",
  "monitoring.coreos.com/v1": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1",
};

function watched(value, path, seen) {
  if (value === null || typeof value !== "object") return value;
  return new Proxy(value, {
    get(target, key) {
      if (typeof key !== "string" || !Object.hasOwn(target, key)) return target[key];
      seen.add(`${path}/${key}`);
      return watched(target[key], `${path}/${key}`, seen);
    },
  });
}

function unread(value, path, seen) {
  if (value === null || typeof value !== "object") return [];
  return Object.keys(value).flatMap((key) => {
    const at = `${path}/${key}`;
    return seen.has(at) ? unread(value[key], at, seen) : [at];
  });
}

function faults(object) {
  const name = `${object.kind} ${object.metadata?.name}`;
  const models = load(PACKAGES[object.apiVersion]);
  if (!(object.kind in models)) return [`${name}: no types for this kind`];
  const seen = new Set();
  const found = [];
  try {
    // On the object itself: the model's constructor would read every key to copy it.
    models[object.kind].prototype.validate.call(watched(object, "", seen));
  } catch (error) {
    found.push(error.message);
  }
  found.push(...unread(object, "", seen).map((path) => `unknown key ${path}`));
  return found.map((text) => `${name}: ${text}`);
}

const objects = JSON.parse(readFileSync(0, "utf8"));
for (const fault of objects.flatMap(faults)) console.log(fault);

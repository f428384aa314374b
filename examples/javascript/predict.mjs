// Classify one PNG with a bundle's frame graph; print the same as `echoquad predict BUNDLE frame.png`.
//
//     node predict.mjs BUNDLE frame.png
//
// Exit codes: 0 done, 1 bad input or bundle, 2 usage, 3 the bundle was changed since the export.
// Research use only: not for diagnosis, triage, or any decision on a patient's care.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { basename, join } from "node:path";
import { FrameError, readGrey } from "./png.mjs";

const SCHEMA = 1;
const QUADRANTS = ["LA", "RA", "LV", "RV"];

/** An error that ends the program with one line and an exit code. */
class ClientError extends Error {
  constructor(message, exitCode) {
    super(message);
    this.exitCode = exitCode;
  }
}

const sha256 = (data) => createHash("sha256").update(data).digest("hex");

/** Read bundle.json and check its own hash. */
function readManifest(bundle) {
  let text, manifest;
  try {
    text = readFileSync(join(bundle, "bundle.json"), "latin1");
  } catch (error) {
    throw new ClientError(`${bundle}: no bundle here (${error.code}); expected a folder that \`echoquad export\` wrote`, 1);
  }
  try {
    manifest = JSON.parse(text);
  } catch {
    throw new ClientError(`${bundle}: bundle.json is not valid JSON; copy the whole bundle again`, 3);
  }
  if (manifest?.schema !== SCHEMA) {
    throw new ClientError(`${bundle}: the bundle has schema ${manifest?.schema}; this client reads ${SCHEMA}`, 1);
  }
  // The hash covers all other keys in canonical JSON: the same text without whitespace between tokens.
  const canonical = text.replace(/("(?:[^"\\]|\\.)*")|\s+/g, "$1");
  const content = canonical.replace(`"manifest_sha256":"${manifest.manifest_sha256}",`, "");
  if (sha256(content) !== manifest.manifest_sha256) {
    throw new ClientError(`${bundle}: bundle.json was damaged or changed since the export; copy the whole bundle again`, 3);
  }
  return manifest;
}

/** Read the frame graph of the default precision; the hashed bytes are the bytes to load. */
function readGraph(bundle, manifest) {
  const name = `frame.${manifest.default_precision}.onnx`;
  const entry = manifest.files[name];
  if (entry === undefined) {
    throw new ClientError(`${bundle}: it holds no ${name}; expected a bundle exported with --frame-graph; export it again`, 1);
  }
  let data;
  try {
    data = readFileSync(join(bundle, name));
  } catch (error) {
    throw new ClientError(`${bundle}: ${name} cannot be read (${error.code}); copy the whole bundle again`, 1);
  }
  const found = sha256(data);
  if (found !== entry.sha256) {
    throw new ClientError(
      `${bundle}: ${name} has SHA-256 ${found.slice(0, 12)}..., expected ${entry.sha256.slice(0, 12)}...: ` +
        "it was damaged or changed since the export; copy the whole bundle again",
      3,
    );
  }
  return data;
}

/** Read the frame as grey levels, uint8 [1, H, W]. */
function readFrame(path) {
  const name = basename(path);
  let frame;
  try {
    frame = readGrey(readFileSync(path));
  } catch (error) {
    if (error instanceof FrameError) throw new ClientError(`${name}: ${error.message}`, 1);
    if (error.code === undefined) throw error;
    throw new ClientError(`${name}: it cannot be read (${error.code}); check the path`, 1);
  }
  const { width, height } = frame;
  if (width < 2 || height < 2) {
    throw new ClientError(`${name}: the frame is ${width}x${height} pixels; expected at least 2x2 to cut four quadrants`, 1);
  }
  return frame;
}

async function loadOnnxruntime() {
  process.env.ORT_DISABLE_TELEMETRY = "1"; // read when the library loads, so before the import
  try {
    return (await import("onnxruntime-node")).default;
  } catch (error) {
    const what = error.message.split("\n")[0];
    throw new ClientError(`onnxruntime-node cannot be loaded (${what}); do: npm ci --ignore-scripts, in this folder`, 1);
  }
}

// y = x w on uint8 [1, 8] and int8 [8, 4], all weights 127: sums of two products exceed 16 bits.
const INTEGER_MODEL =
  "CAgSCGVjaG9xdWFkOngKGAoBeAoBdxIBeSINTWF0TXVsSW50ZWdlchIFcHJvYmUqKwgICAQQA0IBd0ogf39/f39/f39/f39/f39/f39/" +
  "f39/f39/f39/f39/f39aEwoBeBIOCgwIAhIICgIIAQoCCAhiEwoBeRIOCgwIBhIICgIIAQoCCARCBAoAEBI=";

/** Test whether onnxruntime's fastest integer products overflow here, as on x86 without VNNI. */
async function integersOverflow(ort, options) {
  const session = await ort.InferenceSession.create(Buffer.from(INTEGER_MODEL, "base64"), options);
  const { y } = await session.run({ x: new ort.Tensor("uint8", new Uint8Array(8).fill(255), [1, 8]) });
  return Array.from(y.data, Number).some((value) => value !== 8 * 255 * 127);
}

/** Run the graph; return its outputs by name, as flat arrays of numbers. */
async function infer(graph, { width, height, grey }) {
  const ort = await loadOnnxruntime();
  try {
    const options = { executionProviders: ["cpu"], logSeverityLevel: 4 };
    if (graph.includes("QuantizeLinear") && (await integersOverflow(ort, options))) {
      options.extra = { session: { x64quantprecision: "1" } }; // exact but slower
    }
    const session = await ort.InferenceSession.create(graph, options);
    const outputs = await session.run({ frames: new ort.Tensor("uint8", grey, [1, height, width]) });
    return Object.fromEntries(Object.entries(outputs).map(([name, tensor]) => [name, Array.from(tensor.data, Number)]));
  } catch (error) {
    throw new ClientError(`onnxruntime-node cannot run the graph (${error.message.split("\n")[0]}); export it again`, 1);
  }
}

/** Test for a tie of the votes, which mean probabilities decide. */
function tied(votes, classes) {
  const counts = classes.map((_, index) => votes.filter((vote) => vote === index).length);
  return counts.filter((count) => count === Math.max(...counts)).length > 1;
}

/** Return the header and the row of a decision. */
function table(file, { contract, default_precision: precision, typicality: stated }, found) {
  const { classes, vote } = contract;
  const header = ["file", "method", "pred_image", ...classes.map((name) => `prob_${name}`)];
  const row = [file, vote, classes[found.label[0]], ...found.probabilities.map((value) => value.toFixed(4))];
  QUADRANTS.forEach((quadrant, index) => {
    const start = index * classes.length;
    const probabilities = found.quadrant_probabilities.slice(start, start + classes.length);
    header.push(`pred_${quadrant}`, ...classes.map((name) => `p_${quadrant}_${name}`));
    row.push(classes[found.votes[index]], ...probabilities.map((value) => value.toFixed(4)));
  });
  const flags = vote === "majority" && tied(found.votes, classes) ? ["tie"] : [];
  const typicality = found.typicality?.[0]; // missing if the bundle has no such score
  if (typicality < stated?.thresholds?.[precision]?.["99"]) flags.push("unlike-training");
  header.push("flags", "device", "precision", "typicality");
  row.push(flags.join(";"), "cpu", precision, typicality?.toFixed(4) ?? "");
  return [header, row];
}

function csvLine(values) {
  return `${values.map((value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value)).join(",")}\n`;
}

async function main(given) {
  if (given.length !== 2) throw new ClientError("expected two arguments; see: node predict.mjs BUNDLE frame.png", 2);
  const [bundle, path] = given;
  const manifest = readManifest(bundle);
  const graph = readGraph(bundle, manifest);
  const found = await infer(graph, readFrame(path));
  if (!found.quadrant_probabilities.every(Number.isFinite)) {
    const precision = manifest.default_precision;
    throw new ClientError(`${basename(path)}: the network's answer on cpu in ${precision} is not a number; run echoquad verify`, 1);
  }
  process.stdout.write(table(basename(path), manifest, found).map(csvLine).join(""));
}

main(process.argv.slice(2)).catch((error) => {
  const known = error instanceof ClientError;
  process.stderr.write(`error: ${known ? "" : "unexpected "}${error.message.replaceAll(/\s+/g, " ")}\n`);
  process.exitCode = known ? error.exitCode : 1;
});

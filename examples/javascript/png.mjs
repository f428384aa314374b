// Read a PNG as 8-bit grey levels by the same rules as EchoQuad; see docs/reference/contract.md.

import { crc32 } from "node:zlib";
import { PNG } from "pngjs";

const MAX_PIXELS = 36_000_000;
const SIGNATURE = Buffer.from("\x89PNG\r\n\x1a\n", "latin1");
const GREY = 0;
const PALETTE = 3;
const WITH_ALPHA = [PALETTE, 4, 6];

/** A file that cannot be used; the message states the problem, the expectation and the remedy. */
export class FrameError extends Error {}

/**
 * Decode a PNG file.
 *
 * @param {Buffer} file content of the file
 * @returns {{width: number, height: number, grey: Uint8Array}} grey levels 0 to 255, row by row
 * @throws {FrameError} if it is not a PNG, damaged, too large, or carries an orientation
 */
export function readGrey(file) {
  const { kept, transparent } = plainChunks(file);
  let image;
  try {
    image = PNG.sync.read(kept, { skipRescale: true });
  } catch (error) {
    throw new FrameError(`the image is damaged or truncated (${error.message})`);
  }
  const { width, height, depth, colorType, data } = image;
  const level = levelOf(depth, colorType);
  const grey = new Uint8Array(width * height);
  const key = transparentSamples(transparent, depth);
  for (let pixel = 0, at = 0; pixel < grey.length; pixel += 1, at += 4) {
    if (key?.every((sample, channel) => data[at + channel] === sample)) continue; // laid over black
    let [r, g, b] = [level(data[at]), level(data[at + 1]), level(data[at + 2])];
    if (WITH_ALPHA.includes(colorType)) {
      const alpha = level(data[at + 3]);
      [r, g, b] = [overBlack(r, alpha), overBlack(g, alpha), overBlack(b, alpha)];
    }
    // ITU-R 601-2 luma in integers; equal channels give their value.
    grey[pixel] = (19595 * r + 38470 * g + 7471 * b + 32768) >> 16;
  }
  return { width, height, grey };
}

/** Return the conversion of a sample to 8 bits. */
function levelOf(depth, colorType) {
  if (depth === 16) {
    return colorType === GREY ? (value) => Math.floor((value + 128) / 257) : (value) => value >> 8;
  }
  const white = colorType === PALETTE ? 255 : 2 ** depth - 1; // palette colours have 8 bits for any index depth
  return (value) => (value * 255) / white;
}

function overBlack(value, alpha) {
  return Math.floor((value * alpha) / 255 + 0.5);
}

/** Return the samples of the transparent colour of a grey or RGB image, of which the lower bits count. */
function transparentSamples(content, depth) {
  if (content === undefined) return undefined;
  return Array.from({ length: content.length >> 1 }, (_, channel) => content.readUInt16BE(2 * channel) & (2 ** depth - 1));
}

/** Check a file's chunks; return those that hold the pixels, and the transparent colour of a grey or RGB image. */
function plainChunks(file) {
  if (!file.subarray(0, 8).equals(SIGNATURE)) {
    throw new FrameError("the file is not a PNG; expected a PNG image; use echoquad predict for other formats");
  }
  const kept = [SIGNATURE];
  let colorType;
  let transparent;
  for (let start = 8; start + 12 <= file.length; ) {
    const end = start + 12 + file.readUInt32BE(start);
    if (end > file.length) break;
    const name = file.toString("latin1", start + 4, start + 8);
    const content = file.subarray(start + 8, end - 4);
    if (crc32(file.subarray(start + 4, end - 4)) !== file.readUInt32BE(end - 4)) {
      throw new FrameError(`the ${name} chunk of the PNG fails its checksum: the file is damaged; copy it again`);
    }
    if (name === "IHDR" && content.length === 13) {
      const [width, height] = [content.readUInt32BE(0), content.readUInt32BE(4)];
      colorType = content[9];
      if (width * height > MAX_PIXELS) {
        throw new FrameError(`the header states ${width}x${height} pixels; expected at most 36 million`);
      }
    }
    if (name === "acTL") throw new FrameError("the file contains an animation; expected a single frame; extract one");
    if (name === "eXIf" || /^(Raw profile type exif|XML:com\.adobe\.xmp)\0/.test(content.toString("latin1", 0, 32))) {
      throw new FrameError("the file contains EXIF or XMP, which can rotate it; expected none; save it without metadata");
    }
    if (name === "tRNS" && colorType !== PALETTE) transparent = content;
    else if (["IHDR", "PLTE", "tRNS", "IDAT", "IEND"].includes(name)) {
      kept.push(file.subarray(start, end));
    }
    if (name === "IEND") return { kept: Buffer.concat(kept), transparent };
    start = end;
  }
  throw new FrameError("the PNG ends before its last chunk: the file is truncated; copy it again");
}

// Reads a PNG as EchoQuad does: to grey, 8 bits, by one stated rule for each kind of pixel; see docs/reference/contract.md.

import { crc32 } from "node:zlib";
import { PNG } from "pngjs";

const MAX_PIXELS = 36_000_000;
const SIGNATURE = Buffer.from("\x89PNG\r\n\x1a\n", "latin1");
const GREY = 0;
const PALETTE = 3;
const WITH_ALPHA = [PALETTE, 4, 6];

/** A file that cannot be judged; the message says what was found, what was expected, what to do. */
export class FrameError extends Error {}

/**
 * Decode a PNG file.
 *
 * @param {Buffer} file the whole file
 * @returns {{width: number, height: number, grey: Uint8Array}} grey levels 0 to 255, row by row
 * @throws {FrameError} if it is no PNG, damaged, too large, or says that it lies on its side
 */
export function readGrey(file) {
  const kept = plainChunks(file);
  let image;
  try {
    image = PNG.sync.read(kept, { skipRescale: true });
  } catch (error) {
    throw new FrameError(`the image is damaged or truncated (${error.message})`);
  }
  const { width, height, depth, colorType, data } = image;
  const level = levelOf(depth, colorType);
  const grey = new Uint8Array(width * height);
  for (let pixel = 0, at = 0; pixel < grey.length; pixel += 1, at += 4) {
    let [r, g, b] = [level(data[at]), level(data[at + 1]), level(data[at + 2])];
    if (WITH_ALPHA.includes(colorType)) {
      const alpha = level(data[at + 3]);
      [r, g, b] = [overBlack(r, alpha), overBlack(g, alpha), overBlack(b, alpha)];
    }
    // ITU-R 601-2 luma in integers; of equal parts it is the part itself.
    grey[pixel] = (19595 * r + 38470 * g + 7471 * b + 32768) >> 16;
  }
  return { width, height, grey };
}

/** How a sample of this kind becomes one of 8 bits. */
function levelOf(depth, colorType) {
  if (depth === 16) {
    return colorType === GREY ? (value) => Math.floor((value + 128) / 257) : (value) => value >> 8;
  }
  const white = colorType === PALETTE ? 255 : 2 ** depth - 1; // a palette's colours have 8 bits whatever its indices have
  return (value) => (value * 255) / white;
}

function overBlack(value, alpha) {
  return Math.floor((value * alpha) / 255 + 0.5);
}

/**
 * Check a file's chunks and keep those that hold the pixels.
 *
 * What a grey or RGB image names its transparent colour is left out: it is drawn as any other, as EchoQuad does.
 */
function plainChunks(file) {
  if (!file.subarray(0, 8).equals(SIGNATURE)) {
    throw new FrameError("the file is no PNG; expected a PNG image; echoquad predict reads other kinds too");
  }
  const kept = [SIGNATURE];
  let colorType;
  for (let start = 8; start + 12 <= file.length; ) {
    const end = start + 12 + file.readUInt32BE(start);
    if (end > file.length) break;
    const kind = file.toString("latin1", start + 4, start + 8);
    const content = file.subarray(start + 8, end - 4);
    if (crc32(file.subarray(start + 4, end - 4)) !== file.readUInt32BE(end - 4)) {
      throw new FrameError(`the PNG's ${kind} chunk fails its checksum: the file is damaged; copy it again`);
    }
    if (kind === "IHDR" && content.length === 13) {
      const [width, height] = [content.readUInt32BE(0), content.readUInt32BE(4)];
      colorType = content[9];
      if (width * height > MAX_PIXELS) {
        throw new FrameError(`the header announces ${width}x${height} pixels; expected at most 36 million`);
      }
    }
    if (kind === "acTL") throw new FrameError("the file holds an animation; expected one still frame; split it first");
    if (kind === "eXIf" || /^(Raw profile type exif|XML:com\.adobe\.xmp)\0/.test(content.toString("latin1", 0, 32))) {
      throw new FrameError("the file carries EXIF or XMP, which can turn it; expected none; save it without");
    }
    if (["IHDR", "PLTE", "IDAT", "IEND"].includes(kind) || (kind === "tRNS" && colorType === PALETTE)) {
      kept.push(file.subarray(start, end));
    }
    if (kind === "IEND") return Buffer.concat(kept);
    start = end;
  }
  throw new FrameError("the PNG ends before its last chunk: the file is truncated; copy it again");
}

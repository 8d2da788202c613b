/** Converts configurations from and to YAML, and finds the lines of settings. */

import { CORE_SCHEMA, dump, intYaml11Tag, load, parseEvents } from "../vendor/js-yaml.js";

/** Numbers as the command line reads them, including `1_600_000`. */
const SCHEMA = CORE_SCHEMA.withTags(intYaml11Tag);
const WIDTH = 110;

// Kinds of js-yaml's parsing events
const [SEQUENCE, MAPPING, SCALAR, ALIAS, POP] = [2, 3, 4, 5, 6];

/**
 * @typedef {{field: string, message: string, line: number | null}} Mistake
 *   `field`: dotted path of the setting, empty for a mistake of the whole text. `line`: line from 1.
 */

/** @param {string} text @returns {{config: Record<string, any> | null, mistakes: Mistake[]}} */
export function parse(text) {
  try {
    const config = load(text, { schema: SCHEMA });
    if (config !== null && typeof config === "object" && !Array.isArray(config)) return { config, mistakes: [] };
    return { config: null, mistakes: [{ field: "", message: "A configuration is a mapping, such as `name: demo`.", line: 1 }] };
  } catch (error) {
    const message = `This is not YAML: ${error.reason ?? error.message}.`;
    return { config: null, mistakes: [{ field: "", message, line: (error.mark?.line ?? 0) + 1 }] };
  }
}

/** @param {Record<string, any>} config */
export const write = (config) => dump(config, { lineWidth: WIDTH });

/** A configuration with other values of some settings. @param {Record<string, any>} config @param {Record<string, any>} changes */
export function withChanges(config, changes) {
  const changed = structuredClone(config);
  for (const [path, value] of Object.entries(changes)) {
    const parts = path.split(".");
    const last = parts.pop();
    let node = changed;
    for (const part of parts) node = Object.hasOwn(node, part) && node[part] ? node[part] : (node[part] = {});
    node[last] = value;
  }
  return changed;
}

/**
 * Add line numbers to the service's errors.
 * @param {string} text @param {{field: string, message: string}[]} errors Fields as the service names them, `config.tokens.total`.
 * @returns {Mistake[]}
 */
export function place(text, errors) {
  const lines = linesOf(text);
  return errors.map(({ field, message }) => {
    const path = field.replace(/^(body\.)?config\.?/, "");
    return { field: path, message, line: lineOf(lines, path) };
  });
}

/** The line of a setting, or of the nearest section around it. */
function lineOf(lines, path) {
  for (let at = path; at; at = at.slice(0, Math.max(0, at.lastIndexOf(".")))) if (lines.has(at)) return lines.get(at);
  return null;
}

/** The line of every dotted path of a text that parses. @param {string} text @returns {Map<string, number>} */
function linesOf(text) {
  const lines = new Map();
  /** @type {{sequence: boolean, key: string | null, index: number, path: string}[]} */
  const open = [];
  const lineAt = (position) => text.slice(0, position).split("\n").length;

  // Path of the node that begins here; a scalar that is a key of a mapping has none
  const enter = (event) => {
    const parent = open.at(-1);
    if (!parent) return "";
    if (parent.sequence) {
      const path = join(parent.path, String(parent.index++));
      lines.set(path, lineAt(event.start ?? event.valueStart));
      return path;
    }
    if (parent.key === null) {
      parent.key = text.slice(event.valueStart, event.valueEnd);
      lines.set(join(parent.path, parent.key), lineAt(event.valueStart));
      return null;
    }
    const path = join(parent.path, parent.key);
    parent.key = null;
    return path;
  };
  for (const event of parseEvents(text)) {
    if (event.type === SCALAR || event.type === ALIAS) enter(event);
    else if (event.type === SEQUENCE || event.type === MAPPING) {
      open.push({ path: enter(event) ?? "", sequence: event.type === SEQUENCE, key: null, index: 0 });
    } else if (event.type === POP) open.pop();
  }
  return lines;
}

const join = (path, key) => (path ? `${path}.${key}` : key);

/**
 * Changes from one configuration to another, as values by dotted path. Lists, sections from which a setting was removed, and those
 * with a dot in a key, such as tags, are replaced as a whole.
 * @param {any} before @param {any} after @returns {Record<string, any>}
 * @throws {Error} A setting outside of all sections was removed.
 */
export function changesBetween(before, after, path = "") {
  const changes = {};
  for (const key of Object.keys(before).filter((each) => !(each in after))) {
    if (!isSection(before[key])) throw new Error(`${key}: a retry needs a value; write one.`);
    changes[key] = {};
  }
  for (const [key, value] of Object.entries(after)) {
    const old = before[key];
    const here = join(path, key);
    if (same(old, value)) continue;
    const sections = isSection(old) && isSection(value) && Object.keys(old).every((each) => each in value)
      && !Object.keys(value).some((each) => each.includes("."));
    Object.assign(changes, sections ? changesBetween(old, value, here) : { [here]: value });
  }
  return changes;
}

const isSection = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

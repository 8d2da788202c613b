/** What the configuration's schema says of the setting at a place in a YAML text. */

/** @typedef {{name: string, description: string, default: string | null, values: string[], isSection: boolean}} Setting
 *   `default`: as JSON; null if there is none, or for a section. `values`: the values that are possible, if they are few. */

/** Stands in a path for an element of a list or of a mapping with any keys. */
const ANY = "*";

/**
 * Path of the section around a place in a YAML text with block style.
 * @param {string[]} lines @param {number} number Line, from 0. @param {number} column Column at which the key begins.
 * @returns {string[]}
 */
export function sectionPath(lines, number, column) {
  const path = [];
  let [most, inList] = [column, false];
  for (let at = number; at >= 0 && (most > 0 || inList); at--) {
    const [, indent, dashes, key] = /^( *)((?:- +)*)(?:([\w.-]+) *:(?= |$))?/.exec(lines[at]);
    const start = indent.length + dashes.length;
    const isAbove = inList ? start <= most && !dashes : start < most;
    if (at < number && key !== undefined && isAbove) {
      path.unshift(key);
      [most, inList] = [start, false];
    }
    if (dashes && indent.length < most) {
      path.unshift(ANY);
      [most, inList] = [indent.length, true];
    }
  }
  return path;
}

/** Settings of a section; none if it is not a section with known settings. @param {any} schema @param {string[]} path @returns {Setting[]} */
export function settingsOf(schema, path) {
  const nodes = path.reduce((found, part) => found.flatMap((node) => below(schema, node, part)), variants(schema, schema));
  const all = nodes.flatMap((node) => Object.entries(node.properties ?? {}));
  return [...new Map(all).entries()].map(([name, node]) => described(schema, name, node));
}

/** One setting, or undefined. @param {any} schema @param {string[]} path @param {string} name @returns {Setting | undefined} */
export const settingAt = (schema, path, name) => settingsOf(schema, path).find((setting) => setting.name === name);

function described(schema, name, node) {
  const each = variants(schema, node);
  const isSection = each.some((one) => one.properties);
  const values = each.flatMap((one) => one.enum ?? (one.const !== undefined ? [one.const] : one.type === "boolean" ? [true, false] : []));
  const description = node.description ?? each.map((one) => one.description).find(Boolean) ?? "";
  const known = node.default !== undefined && !isSection;
  return {
    name,
    description: description.replaceAll("\n", " "),
    default: known ? JSON.stringify(node.default) : null,
    values: values.map((value) => (typeof value === "string" ? value : JSON.stringify(value))),
    isSection,
  };
}

/** Schemas of the values below a node. */
function below(schema, node, part) {
  if (node.properties?.[part]) return variants(schema, node.properties[part]);
  const others = [node.items, ...Object.values(node.patternProperties ?? {}), node.additionalProperties];
  return others.filter((other) => other && typeof other === "object").flatMap((other) => variants(schema, other));
}

/** A node without references and alternatives: one node for each alternative. */
function variants(schema, node) {
  if (node.$ref) return variants(schema, schema.$defs[node.$ref.split("/").at(-1)]);
  const parts = node.anyOf ?? node.oneOf;
  return parts ? parts.flatMap((part) => variants(schema, part)) : [node];
}

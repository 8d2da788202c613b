/** Routes in the fragment of the URL, such as `#/runs/01J...`. */

import { useEffect, useState } from "./lib.js";

/** @typedef {{view: "runs" | "run" | "submit" | "retry" | "compare" | "pools" | "projects" | "account" | "unknown", id?: string, changes?: Record<string, any>,
 *   filter?: Record<string, string>}} Route
 *   `id`: of the run, or of the run that a new one copies. `changes`: settings that a retry begins with, by dotted path. `filter`: filters and order of the list of runs. */

/** @param {string} fragment @returns {Route} */
export function routeOf(fragment) {
  const [path, query] = fragment.replace(/^#\/?/, "").split("?");
  const [first = "", id, last] = path.split("/");
  if (first === "" || (first === "runs" && !id)) return { view: "runs", filter: Object.fromEntries(new URLSearchParams(query)) };
  if (first === "runs" && !last) return { view: "run", id };
  if (first === "runs" && last === "retry") return { view: "retry", id, changes: changesIn(query) };
  if (first === "compare" && id) return { view: "compare", id };
  if (first === "submit") return { view: "submit", id: new URLSearchParams(query).get("from") };
  if (["pools", "projects", "account"].includes(first)) return { view: first };
  return { view: "unknown" };
}

/** The current route, updated when it changes. @returns {Route} */
export function useRoute() {
  const [fragment, setFragment] = useState(location.hash);
  useEffect(() => {
    const moved = () => setFragment(location.hash);
    addEventListener("hashchange", moved);
    // The fragment may have changed since the first read
    moved();
    return () => removeEventListener("hashchange", moved);
  }, []);
  return routeOf(fragment);
}

/** @param {string} path Path of the route, such as `/runs`. */
export function go(path) {
  location.hash = "#" + path;
}

/** Address of a retry that begins with changed settings. @param {string} id @param {Record<string, any>} changes */
export const retryAddress = (id, changes) =>
  `#/runs/${id}/retry?${new URLSearchParams(Object.entries(changes).map(([path, value]) => [path, JSON.stringify(value)]))}`;

function changesIn(query) {
  return Object.fromEntries([...new URLSearchParams(query)].map(([path, value]) => [path, valueOf(value)]));
}

/** A value of an address: JSON, or text that is none. */
function valueOf(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

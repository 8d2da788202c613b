/** Routes in the fragment of the URL, such as `#/runs/01J...`. */

import { useEffect, useState } from "./lib.js";

/** @typedef {{view: "runs" | "run" | "submit" | "retry" | "compare" | "pools" | "unknown", id?: string}} Route */

/** @param {string} fragment @returns {Route} */
export function routeOf(fragment) {
  const [first = "", id, last] = fragment.replace(/^#\/?/, "").split("/");
  if (first === "" || (first === "runs" && !id)) return { view: "runs" };
  if (first === "runs" && !last) return { view: "run", id };
  if (first === "runs" && last === "retry") return { view: "retry", id };
  if (first === "compare" && id) return { view: "compare", id };
  if (first === "submit") return { view: "submit" };
  if (first === "pools") return { view: "pools" };
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

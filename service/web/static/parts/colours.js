/** Colours of the present scheme, for what is drawn on a canvas. */

import { useEffect, useReducer } from "../lib.js";

/** @param {string} name A CSS variable, `--ink`. @returns {string} */
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Draw again when the reader's scheme changes. @returns {boolean} Whether it is dark. */
export function useDark() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const [, redraw] = useReducer((turn) => turn + 1, 0);
  useEffect(() => {
    dark.addEventListener("change", redraw);
    return () => dark.removeEventListener("change", redraw);
  }, []);
  return dark.matches;
}

/** Colours of the current colour scheme, for drawing on a canvas. */

import { useEffect, useReducer } from "../lib.js";

/** @param {string} name CSS variable, such as `--ink`. @returns {string} */
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Whether the colour scheme is dark; redraws when it changes. @returns {boolean} */
export function useDark() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const [, redraw] = useReducer((turn) => turn + 1, 0);
  useEffect(() => {
    dark.addEventListener("change", redraw);
    return () => dark.removeEventListener("change", redraw);
  }, []);
  return dark.matches;
}

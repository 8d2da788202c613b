/** Requests that are made, and kept open, while the page is visible. */

import { watchConnection } from "./connection.js";
import { useEffect, useReducer, useRef, useState } from "./lib.js";
import { now } from "./words.js";

/**
 * Load now, every few seconds, when the page becomes visible, and when the connection is back.
 * @template T
 * @param {(signal: AbortSignal) => Promise<T>} load
 * @param {number | null} seconds With null, not every few seconds: for lists that may have many pages.
 * @param {unknown[]} inputs Dependencies of `load`.
 * @returns {{value: T | null, problem: Error | null, reload: () => void}} After a failure, `value` keeps the last result.
 */
export function usePolled(load, seconds, inputs) {
  const [value, setValue] = useState(null);
  const [problem, setProblem] = useState(null);
  const reload = useRef(() => {});
  useEffect(() => {
    const ending = new AbortController();
    let timer = 0;
    let rounds = 0;
    const round = async () => {
      clearTimeout(timer);
      const mine = ++rounds;
      const overtaken = () => ending.signal.aborted || mine !== rounds;
      try {
        const answer = await load(ending.signal);
        if (overtaken()) return;
        setValue(answer);
        setProblem(null);
      } catch (error) {
        if (overtaken()) return;
        setProblem(error);
      }
      if (seconds !== null) timer = setTimeout(() => !document.hidden && round(), seconds * 1000);
    };
    const seen = () => !document.hidden && round();
    const unwatch = watchConnection((reached) => reached && round());
    document.addEventListener("visibilitychange", seen);
    reload.current = round;
    round();
    return () => {
      ending.abort();
      clearTimeout(timer);
      unwatch();
      document.removeEventListener("visibilitychange", seen);
    };
  }, inputs);
  return { value, problem, reload: () => reload.current() };
}

/**
 * Keep something open while the page is visible: a browser has six connections per host for all its tabs.
 * @param {() => () => void} open Opens it, now and whenever the page becomes visible again, and returns what closes it.
 * @returns {() => void} Closes it for good.
 */
export function whileVisible(open) {
  let close = null;
  const turned = () => {
    if (!document.hidden) close ??= open();
    else {
      close?.();
      close = null;
    }
  };
  document.addEventListener("visibilitychange", turned);
  turned();
  return () => {
    document.removeEventListener("visibilitychange", turned);
    close?.();
  };
}

/** The current time, updated periodically to show ages. @param {number} seconds Interval (s). */
export function useNow(seconds = 1) {
  const [, tick] = useReducer((ticks) => ticks + 1, 0);
  useEffect(() => {
    const timer = setInterval(() => !document.hidden && tick(), seconds * 1000);
    return () => clearInterval(timer);
  }, [seconds]);
  return now();
}

/** What is asked again and again while somebody looks. */

import { watchConnection } from "./connection.js";
import { useEffect, useReducer, useRef, useState } from "./lib.js";
import { now } from "./words.js";

/**
 * Ask now, every few seconds, when the page is looked at again, and when the connection is back.
 * @template T
 * @param {(signal: AbortSignal) => Promise<T>} load
 * @param {number} seconds
 * @param {unknown[]} inputs What `load` depends on.
 * @returns {{value: T | null, problem: Error | null, reload: () => void}} The last answer stays while a later one fails.
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
      timer = setTimeout(() => !document.hidden && round(), seconds * 1000);
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

/** The present moment, renewed every so often, for what shows an age. @param {number} seconds */
export function useNow(seconds = 1) {
  const [, tick] = useReducer((ticks) => ticks + 1, 0);
  useEffect(() => {
    const timer = setInterval(() => !document.hidden && tick(), seconds * 1000);
    return () => clearInterval(timer);
  }, [seconds]);
  return now();
}

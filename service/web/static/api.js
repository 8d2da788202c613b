/** Requests to the service, authenticated by the session cookie. */

import { connectionFailed } from "./connection.js";

const MOST_PER_PAGE = 200;

/** An error response of the service (RFC 9457). */
export class Problem extends Error {
  /** @param {number} status @param {{title?: string, detail?: string, errors?: {field: string, message: string}[]}} body */
  constructor(status, body) {
    super(body.detail || body.title || `The service answered ${status}.`);
    this.status = status;
    this.title = body.title ?? "";
    this.mistakes = body.errors ?? [];
  }
}

/** The request or its response was lost. */
export class ConnectionLost extends Error {
  constructor() {
    super("The service cannot be reached.");
  }
}

/** @type {() => void} */
let signedOut = () => {};

/** @param {() => void} listener Called when a response shows that the session has ended. */
export function onSignedOut(listener) {
  signedOut = listener;
}

/**
 * Request JSON.
 * @param {string} path
 * @param {{method?: string, body?: unknown, headers?: Record<string, string>, signal?: AbortSignal}} [options]
 * @returns {Promise<any>} JSON of the response; null if it is empty.
 * @throws {Problem | ConnectionLost | DOMException} DOMException: the request was aborted.
 */
export async function ask(path, options = {}) {
  const answer = await send(path, options);
  return answer.status === 204 ? null : answer.json();
}

/** Request a list whole, page by page. @param {string} path @param {AbortSignal} signal @returns {Promise<any[]>} */
export async function askAll(path, signal) {
  const items = [];
  let cursor = null;
  do {
    const page = await ask(`${path}${query({ limit: MOST_PER_PAGE, cursor })}`, { signal });
    items.push(...page.items);
    cursor = page.next_cursor;
  } while (cursor);
  return items;
}

/** Request text. @param {string} path @param {{signal?: AbortSignal}} [options] @returns {Promise<string>} */
export async function askText(path, options = {}) {
  return (await send(path, options)).text();
}

/**
 * Read a text that grows, in pieces.
 * @param {string} path @param {AbortSignal} signal @param {(piece: string) => void} take
 */
export async function followText(path, signal, take) {
  const answer = await send(path, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      take(value);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ConnectionLost();
  }
}

/** A query string without empty fields; a list is a field that is repeated.
 * @param {Record<string, string | number | string[] | null | undefined>} fields */
export function query(fields) {
  const each = Object.entries(fields).flatMap(([name, value]) => [value].flat().map((one) => [name, one]));
  const filled = each.filter(([, value]) => value !== "" && value != null);
  return filled.length ? "?" + new URLSearchParams(filled) : "";
}

/** A random Idempotency-Key. */
export function newKey() {
  // crypto.randomUUID exists only on HTTPS and localhost
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * A path of the service as a relative URL, because a proxy may serve the page below a path of its own.
 * @param {string} path Path that begins with a slash.
 */
export const here = (path) => path.slice(1);

async function send(path, { method = "GET", body, headers = {}, signal } = {}) {
  const request = { method, headers: { Accept: "application/json", ...headers }, signal, cache: "no-store" };
  if (body !== undefined) {
    request.body = JSON.stringify(body);
    request.headers["Content-Type"] = "application/json";
  }
  let answer;
  try {
    answer = await fetch(here(path), request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    connectionFailed();
    throw new ConnectionLost();
  }
  if (answer.ok) return answer;
  if (answer.status === 401 && path !== "/v1/session") signedOut();
  throw await problemOf(answer);
}

async function problemOf(answer) {
  const mediaType = answer.headers.get("Content-Type") ?? "";
  if (mediaType.includes("json")) return new Problem(answer.status, await answer.json());
  if (answer.status === 502 || answer.status === 504) {
    connectionFailed();
    return new ConnectionLost();
  }
  return new Problem(answer.status, { title: answer.statusText });
}

/** Formats numbers and times in the same way as the terminal. */

const SIZES = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];
const GIB = 2 ** 30;

/** Three digits and a unit: `812`, `1.20M`, `14.3B`. @param {number} number */
export function count(number) {
  for (const [size, unit] of SIZES) {
    if (Math.abs(number) >= size * 0.9995) {
      const value = number / size;
      const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.max(1, Math.abs(value) * 1.0005))));
      return value.toFixed(digits) + unit;
    }
  }
  return number.toFixed(0);
}

/** All digits, in groups: `1,600,000`. @param {number} number */
export const whole = (number) => number.toLocaleString("en-US", { maximumFractionDigits: 0 });

/** A fixed number of decimals, or a dash for a missing value. @param {number | null | undefined} number */
export const decimal = (number, digits) =>
  number == null || !Number.isFinite(number)
    ? "–"
    : number.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });

/** A duration: `8.2 s`, `3 min 05 s`, `2 h 10 min`, `3 d 4 h`. @param {number | null} seconds */
export function duration(seconds) {
  if (seconds === null) return "unknown";
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes} min ${String(whole % 60).padStart(2, "0")} s`;
  const hours = Math.floor(minutes / 60);
  if (hours < 72) return `${hours} h ${String(minutes % 60).padStart(2, "0")} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** How long ago, in one unit: `12 s`, `4 min`, `3 h`, `5 d`. @param {number} seconds */
export function age(seconds) {
  const ago = Math.max(0, seconds);
  if (ago < 60) return `${Math.floor(ago)} s`;
  if (ago < 3600) return `${Math.floor(ago / 60)} min`;
  if (ago < 172800) return `${Math.floor(ago / 3600)} h`;
  return `${Math.floor(ago / 86400)} d`;
}

/** Dollars, with four decimals below one dollar. @param {number | null | undefined} dollars */
export function dollars(dollars) {
  if (dollars == null) return "–";
  const digits = dollars >= 1 || dollars === 0 ? 2 : 4;
  return "$" + dollars.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** A price, to the cent. @param {number} dollars */
export const price = (dollars) => `$${decimal(dollars, 2)}`;

/** A share of one: `54 %`. @param {number} share */
export const percent = (share) => `${Math.round(100 * share)} %`;

/** Bytes in GiB, the unit of the memory that torch reports. @param {number} bytes */
export function gigabytes(bytes) {
  const value = bytes / GIB;
  return value.toFixed(value < 10 ? 2 : 1);
}

/** Date and time in the reader's time zone. @param {number} seconds since the epoch */
export const moment = (seconds) => new Date(seconds * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" });

/** A moment to the minute, without the date if it is today. @param {number} seconds since the epoch @param {number} now */
export function when(seconds, now) {
  const [date, today] = [seconds, now].map((each) => new Date(each * 1000));
  const day = date.toDateString() === today.toDateString() ? {} : { day: "numeric", month: "short" };
  return date.toLocaleString("en-GB", { ...day, hour: "2-digit", minute: "2-digit" });
}

/** The time of day. @param {number} seconds since the epoch */
export const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en-GB");

/** `1 run`, `3 runs`. @param {number} number @param {string} noun */
export const plural = (number, noun) => `${whole(number)} ${noun}${number === 1 ? "" : "s"}`;

/** Now, in seconds since the epoch. */
export const now = () => Date.now() / 1000;

/** Lines over a common axis, drawn by uPlot. */

import { html, useEffect, useLayoutEffect, useRef } from "../lib.js";
import uPlot from "../vendor/uplot.js";
import { count } from "../words.js";
import { colour, useDark } from "./colours.js";

/**
 * @typedef {{key: string, tone: string, dash: number[] | null, faint?: boolean, x: number[], y: (number | null)[]}} Line
 *   `tone`: CSS variable of the colour. `faint`: whether the line is drawn pale, as raw values behind a mean.
 */

const FAINT = 0.22;
const HEIGHT = 280;
/** uPlot's numbers of the distributions of a scale. */
const [LINEAR, LOGARITHMIC] = [1, 3];

/**
 * @param {{label: string, lines: Line[], format: (value: number, step: number) => string, logarithmic: boolean,
 *   point: (x: number | null) => void}} props
 *   `label`: description for screen readers. `format`: format of the vertical axis, given the distance between two ticks.
 *   `logarithmic`: whether the vertical axis is; values of 0 and below are then left out.
 *   `point`: called with the position of the pointer.
 */
export function LineChart({ label, lines, format, logarithmic, point }) {
  const box = useRef(null);
  const chart = useRef(null);
  const dark = useDark();
  const shape = lines.map((line) => line.key + (line.faint ? "~" : "")).join("|");
  const latest = useRef(point);
  latest.current = point;

  useLayoutEffect(() => {
    const place = box.current;
    const drawn = new uPlot(
      options(lines, format, logarithmic, (x) => latest.current(x), place.clientWidth), tables(lines, logarithmic), place);
    chart.current = drawn;
    const fitting = new ResizeObserver(() => drawn.setSize({ width: place.clientWidth, height: HEIGHT }));
    fitting.observe(place);
    return () => {
      fitting.disconnect();
      drawn.destroy();
      chart.current = null;
    };
  }, [shape, dark, format, logarithmic]);

  useEffect(() => {
    chart.current?.setData(tables(lines, logarithmic));
  }, [lines, logarithmic]);

  return html`<div class="chart" ref=${box} role="img" aria-label=${label}></div>`;
}

/** A count without trailing zeros: `1.2M`, `10M`. */
function tick(value) {
  if (Math.abs(value) < 10 && !Number.isInteger(value)) return String(Number(value.toPrecision(4)));
  const words = count(value);
  return words.includes(".") ? words.replace(/\.?0+(?=[A-Za-z]$)/, "") : words;
}

/** All lines on one horizontal axis; a line is drawn across its gaps. */
function tables(lines, logarithmic) {
  const drawn = (y) => (logarithmic ? y.map((value) => (value > 0 ? value : null)) : y);
  return lines.length ? uPlot.join(lines.map((line) => [line.x, drawn(line.y)])) : [[]];
}

function options(lines, format, logarithmic, point, width) {
  const ink = colour("--soft");
  const axis = {
    stroke: ink, font: `11px ${colour("--sans")}`, ticks: { show: false }, grid: { stroke: colour("--line"), width: 1 },
  };
  return {
    width,
    height: HEIGHT,
    padding: [10, 8, 0, 0],
    legend: { show: false },
    scales: { x: { time: false }, y: { distr: logarithmic ? LOGARITHMIC : LINEAR } },
    axes: [
      { ...axis, values: (_, ticks) => ticks.map(tick), size: 28, grid: { show: false } },
      { ...axis, values: (_, ticks, __, ___, step) => ticks.map((tick) => (tick === null ? null : format(tick, step))), size: 52 },
    ],
    cursor: { drag: { x: true, y: false }, points: { size: 7 } },
    series: [{}, ...lines.map(series)],
    hooks: { setCursor: [(chart) => point(chart.cursor.idx == null ? null : chart.data[0][chart.cursor.idx])] },
  };
}

const series = ({ key, tone, dash, faint }) => ({
  label: key,
  stroke: colour(tone),
  alpha: faint ? FAINT : 1,
  width: 1.75,
  dash: dash ?? undefined,
  spanGaps: true,
  points: { show: false },
});

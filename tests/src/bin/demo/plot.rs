//! The picture: how long each snapshot held up requests, beside how long requests take anyway.

use std::fmt::Write as _;

use snapfence_tests::guest::Progress;

use crate::{Taken, median, ms};

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 70.0;
const BOTTOM: f64 = 50.0;

const STALL: &str = "#c2410c";
const GUEST: &str = "#94a3b8";
const INK: &str = "#0f172a";
const GRID: &str = "#e2e8f0";

/// Both axes: time to the right, milliseconds upwards by powers of ten.
struct Axes {
    seconds: f64,
    /// Powers of ten at the lower and the upper end.
    low: i32,
    high: i32,
}

impl Axes {
    fn x(&self, seconds: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * seconds / self.seconds
    }

    fn y(&self, ms: f64) -> f64 {
        let (low, high) = (f64::from(self.low), f64::from(self.high));
        let share = (ms.max(f64::powi(10.0, self.low)).log10() - low) / (high - low);
        HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share
    }
}

/// An SVG with the stall of each snapshot and the guest's slowest request of each interval between two of its reports.
pub(crate) fn stalls(taken: &[Taken], history: &[Progress], accelerator: &str) -> String {
    let stalls: Vec<u64> = taken.iter().map(|taken| taken.snapshot.stall_us()).collect();
    let all = || stalls.iter().chain(history.iter().map(|report| &report.slowest_us)).filter(|us| **us > 0);
    let power = |us: Option<&u64>| us.map_or(0.0, |us| ms(*us).log10());
    let seconds = history.iter().map(|report| report.elapsed_ms).max().unwrap_or(0) as f64 / 1000.0;
    let seconds = taken.iter().map(|taken| taken.at.as_secs_f64()).fold(seconds, f64::max).max(1.0) * 1.02;
    // The ends of an axis are small whole numbers.
    let (low, high) = (power(all().min()).floor() as i32, power(all().max()).ceil() as i32);
    let axes = Axes { seconds, low, high: high.max(low + 1) };

    let mut svg = String::new();
    // Writing to a string cannot fail.
    let _ = draw(&mut svg, &axes, taken, &stalls, history, accelerator);
    svg
}

fn draw(svg: &mut String, axes: &Axes, taken: &[Taken], stalls: &[u64], history: &[Progress], accelerator: &str) -> std::fmt::Result {
    let middle = median(stalls);
    let longest = stalls.iter().max().copied().unwrap_or(0);
    writeln!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" fill="{INK}">"#
    )?;
    writeln!(svg, r##"<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>"##)?;
    writeln!(
        svg,
        r#"<text x="{LEFT}" y="26" font-size="17">{} live group snapshots: median stall {:.2} ms, longest {:.2} ms</text>"#,
        taken.len(),
        ms(middle),
        ms(longest)
    )?;
    writeln!(
        svg,
        r#"<circle cx="{}" cy="44" r="5" fill="{STALL}"/><text x="{}" y="48">stall of a snapshot (longest held request)</text>"#,
        LEFT + 5.0,
        LEFT + 16.0
    )?;
    writeln!(
        svg,
        r#"<rect x="{}" y="39" width="10" height="10" fill="{GUEST}"/><text x="{}" y="48">slowest request in the guest ({accelerator}), per report</text>"#,
        LEFT + 300.0,
        LEFT + 316.0
    )?;

    for power in axes.low..=axes.high {
        let value = f64::powi(10.0, power);
        let y = axes.y(value);
        writeln!(svg, r#"<line x1="{LEFT}" y1="{y:.1}" x2="{}" y2="{y:.1}" stroke="{GRID}"/>"#, WIDTH - RIGHT)?;
        writeln!(svg, r#"<text x="{}" y="{:.1}" text-anchor="end">{value} ms</text>"#, LEFT - 6.0, y + 4.0)?;
    }
    let step = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0].into_iter().find(|step| axes.seconds / step <= 12.0).unwrap_or(200.0);
    let mut second = 0.0;
    while second <= axes.seconds {
        writeln!(svg, r#"<text x="{:.1}" y="{}" text-anchor="middle">{second}</text>"#, axes.x(second), HEIGHT - BOTTOM + 18.0)?;
        second += step;
    }
    writeln!(
        svg,
        r#"<text x="{}" y="{}" text-anchor="middle">seconds since the guest began to write</text>"#,
        (WIDTH + LEFT - RIGHT) / 2.0,
        HEIGHT - 10.0
    )?;

    let mut begun = 0.0;
    for report in history {
        let ended = report.elapsed_ms as f64 / 1000.0;
        let (x, y) = (axes.x(begun), axes.y(ms(report.slowest_us)));
        let (width, height) = ((axes.x(ended) - x - 1.0).max(0.5), HEIGHT - BOTTOM - y);
        writeln!(svg, r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" fill="{GUEST}" fill-opacity="0.55"/>"#)?;
        begun = ended;
    }
    for (taken, stall) in taken.iter().zip(stalls) {
        let (x, y) = (axes.x(taken.at.as_secs_f64()), axes.y(ms(*stall)));
        writeln!(svg, r#"<line x1="{x:.1}" y1="{}" x2="{x:.1}" y2="{y:.1}" stroke="{STALL}"/>"#, HEIGHT - BOTTOM)?;
        let name = &taken.snapshot.name;
        writeln!(svg, r#"<circle cx="{x:.1}" cy="{y:.1}" r="5" fill="{STALL}"><title>{name}: {:.3} ms</title></circle>"#, ms(*stall))?;
    }
    writeln!(svg, "</svg>")
}

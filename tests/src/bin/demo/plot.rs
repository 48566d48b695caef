//! The picture: how long each snapshot held up requests, beside how long requests take anyway.

use std::fmt::Write as _;

use snapfence_tests::guest::Progress;

use crate::{Taken, median};

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

/// The shortest time on the picture; shorter ones, 0 among them, are drawn there.
const SHORTEST_US: u64 = 1;

/// Both axes: time to the right, microseconds upwards by powers of ten from [`SHORTEST_US`].
struct Axes {
    seconds: f64,
    /// Power of ten at the upper end.
    high: u32,
}

impl Axes {
    fn x(&self, seconds: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * seconds / self.seconds
    }

    fn y(&self, us: u64) -> f64 {
        let share = (us.max(SHORTEST_US) as f64).log10() / f64::from(self.high);
        HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share
    }
}

/// An SVG with stall and switch of each snapshot and the guest's slowest request of each interval between two of its reports.
pub(crate) fn stalls(taken: &[Taken], history: &[Progress], accelerator: &str) -> String {
    let stalls: Vec<u64> = taken.iter().map(|taken| taken.snapshot.stall_us()).collect();
    let longest = taken.iter().map(|taken| taken.switch_us()).chain(stalls.iter().copied());
    let longest = longest.chain(history.iter().map(|report| report.slowest_us)).max().unwrap_or(0);
    let seconds = history.iter().map(|report| report.elapsed_ms).max().unwrap_or(0) as f64 / 1000.0;
    let seconds = taken.iter().map(|taken| taken.at.as_secs_f64()).fold(seconds, f64::max).max(1.0) * 1.02;
    let axes = Axes { seconds, high: (longest.max(2) as f64).log10().ceil() as u32 };

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
        r#"<text x="{LEFT}" y="26" font-size="17">{} live group snapshots: median stall {middle} µs, longest {longest} µs</text>"#,
        taken.len(),
    )?;
    writeln!(
        svg,
        r#"<circle cx="{}" cy="44" r="5" fill="{STALL}"/><text x="{}" y="48">stall: longest held completion</text>"#,
        LEFT + 5.0,
        LEFT + 16.0
    )?;
    writeln!(
        svg,
        r#"<circle cx="{}" cy="44" r="4" fill="none" stroke="{STALL}"/><text x="{}" y="48">switch: first to last queue</text>"#,
        LEFT + 225.0,
        LEFT + 236.0
    )?;
    writeln!(
        svg,
        r#"<rect x="{}" y="39" width="10" height="10" fill="{GUEST}"/><text x="{}" y="48">slowest request in the guest ({accelerator}), per report</text>"#,
        LEFT + 430.0,
        LEFT + 446.0
    )?;

    for power in 0..=axes.high {
        let us = u64::pow(10, power);
        let y = axes.y(us);
        let label = match us {
            0..1000 => format!("{us} µs"),
            1000..1_000_000 => format!("{} ms", us / 1000),
            _ => format!("{} s", us / 1_000_000),
        };
        writeln!(svg, r#"<line x1="{LEFT}" y1="{y:.1}" x2="{}" y2="{y:.1}" stroke="{GRID}"/>"#, WIDTH - RIGHT)?;
        writeln!(svg, r#"<text x="{}" y="{:.1}" text-anchor="end">{label}</text>"#, LEFT - 6.0, y + 4.0)?;
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
        let (x, y) = (axes.x(begun), axes.y(report.slowest_us));
        let (width, height) = ((axes.x(ended) - x - 1.0).max(0.5), HEIGHT - BOTTOM - y);
        writeln!(svg, r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" fill="{GUEST}" fill-opacity="0.55"/>"#)?;
        begun = ended;
    }
    for (taken, stall) in taken.iter().zip(stalls) {
        let (x, y) = (axes.x(taken.at.as_secs_f64()), axes.y(*stall));
        let (name, switch) = (&taken.snapshot.name, taken.switch_us());
        writeln!(svg, r#"<circle cx="{x:.1}" cy="{:.1}" r="4" fill="none" stroke="{STALL}"/>"#, axes.y(switch))?;
        writeln!(svg, r#"<line x1="{x:.1}" y1="{}" x2="{x:.1}" y2="{y:.1}" stroke="{STALL}"/>"#, HEIGHT - BOTTOM)?;
        write!(svg, r#"<circle cx="{x:.1}" cy="{y:.1}" r="5" fill="{STALL}">"#)?;
        writeln!(svg, "<title>{name}: stall {stall} µs, switch {switch} µs</title></circle>")?;
    }
    writeln!(svg, "</svg>")
}

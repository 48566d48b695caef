//! Plots as drawings inside a page.

use std::fmt::Write as _;

use snapfence_benches::html::escape;

use super::report::{Axis, Plot};

const COLOURS: [&str; 6] = ["#0b6e4f", "#7fb69a", "#c44536", "#5c677d", "#d9a441", "#3a6ea5"];
const BAR: f64 = 360.0;
/// Of a plot with lines: the part inside the axes, and what is left and above of it.
const WIDTH: f64 = 520.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 70.0;
const TOP: f64 = 10.0;

/// The plot as an SVG element.
pub(super) fn svg(plot: &Plot, title: &str) -> String {
    match plot {
        Plot::Bars { unit, bars } => draw_bars(unit, bars, title),
        Plot::Lines { x, y, lines } => draw_lines(*x, *y, lines, title),
    }
}

fn draw_bars(unit: &str, bars: &[(String, f64)], title: &str) -> String {
    let most = bars.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
    let mut svg = open(720.0, bars.len() as f64 * 22.0 + 4.0, title);
    for (row, ((name, value), colour)) in bars.iter().zip(COLOURS.iter().cycle()).enumerate() {
        let (y, width) = (row as f64 * 22.0, value / most * BAR);
        text(&mut svg, 0.0, y + 14.0, "start", name);
        let _ = write!(svg, "<rect x=\"170\" y=\"{y}\" width=\"{width:.1}\" height=\"18\" fill=\"{colour}\"/>");
        text(&mut svg, 176.0 + width, y + 14.0, "start", &format!("{} {unit}", short(*value)));
    }
    svg + "</svg>"
}

fn draw_lines(x: Axis, y: Axis, lines: &[(String, Vec<(f64, f64)>)], title: &str) -> String {
    let points = || lines.iter().flat_map(|(_, points)| points);
    let x = Scale::over(x, points().map(|point| point.0));
    let y = Scale::over(y, points().map(|point| point.1));
    let legend = lines.len() as f64 * 18.0;
    let mut svg = open(LEFT + WIDTH + 30.0, TOP + HEIGHT + 40.0 + legend, title);
    let (across, up) = (|value: f64| LEFT + x.place(value) * WIDTH, |value: f64| TOP + (1.0 - y.place(value)) * HEIGHT);
    for tick in y.ticks() {
        let at = up(tick);
        let _ = write!(svg, "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>", LEFT + WIDTH);
        text(&mut svg, LEFT - 6.0, at + 4.0, "end", &short(tick));
    }
    for tick in x.ticks() {
        let at = across(tick);
        let _ = write!(svg, "<line y1=\"{TOP}\" y2=\"{}\" x1=\"{at:.1}\" x2=\"{at:.1}\" stroke=\"#eee\"/>", TOP + HEIGHT);
        text(&mut svg, at, TOP + HEIGHT + 16.0, "middle", &short(tick));
    }
    text(&mut svg, LEFT + WIDTH / 2.0, TOP + HEIGHT + 32.0, "middle", x.axis.name);
    let middle = TOP + HEIGHT / 2.0;
    let _ = write!(
        svg,
        "<text x=\"12\" y=\"{middle}\" text-anchor=\"middle\" transform=\"rotate(-90 12 {middle})\">{}</text>",
        escape(y.axis.name)
    );
    for (number, ((name, points), colour)) in lines.iter().zip(COLOURS.iter().cycle()).enumerate() {
        let path: Vec<String> = points.iter().map(|(at, value)| format!("{:.1},{:.1}", across(*at), up(*value))).collect();
        let _ = write!(svg, "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>", path.join(" "));
        let below = TOP + HEIGHT + 52.0 + number as f64 * 18.0;
        let _ = write!(svg, "<rect x=\"{LEFT}\" y=\"{}\" width=\"14\" height=\"4\" fill=\"{colour}\"/>", below - 6.0);
        text(&mut svg, LEFT + 20.0, below, "start", name);
    }
    svg + "</svg>"
}

/// From values to the part of an axis's length.
struct Scale {
    axis: Axis,
    low: f64,
    high: f64,
}

impl Scale {
    fn over(axis: Axis, values: impl Iterator<Item = f64>) -> Self {
        let usable = values.filter(|value| value.is_finite() && (!axis.is_logarithmic || *value > 0.0));
        let (low, high) = usable.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
        let (low, high) = if low > high { (1.0, 2.0) } else { (low, high) };
        match axis.is_logarithmic {
            true => Self { axis, low: 10_f64.powf(low.log10().floor()), high: 10_f64.powf((high * 1.0001).log10().ceil()) },
            false => Self { axis, low: low.min(0.0), high: if high > low.min(0.0) { high } else { low + 1.0 } },
        }
    }

    fn place(&self, value: f64) -> f64 {
        let place = match self.axis.is_logarithmic {
            true => (value.max(self.low).log10() - self.low.log10()) / (self.high.log10() - self.low.log10()),
            false => (value - self.low) / (self.high - self.low),
        };
        place.clamp(0.0, 1.0)
    }

    fn ticks(&self) -> Vec<f64> {
        if self.axis.is_logarithmic {
            let (first, last) = (self.low.log10().round() as i32, self.high.log10().round() as i32);
            return (first..=last).map(|power| 10_f64.powi(power)).collect();
        }
        let rough = (self.high - self.low) / 5.0;
        let unit = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * unit).into_iter().find(|step| *step >= rough).unwrap_or(rough);
        let first = (self.low / step).ceil() as i64;
        (first..).map(|number| number as f64 * step).take_while(|tick| *tick <= self.high * 1.0001).collect()
    }
}

fn open(width: f64, height: f64, title: &str) -> String {
    format!("<svg width=\"{width}\" height=\"{height}\" role=\"img\" aria-label=\"{}\">", escape(title))
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, content: &str) {
    // Writing to a string cannot fail.
    let _ = write!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>", escape(content));
}

/// A number with three digits that count, or all before the point.
pub(super) fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 || size == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}").trim_end_matches(".0").to_owned(),
        size if size >= 0.01 => format!("{value:.2}").trim_end_matches('0').trim_end_matches('.').to_owned(),
        _ => format!("{value:e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Axis = Axis { name: "", is_logarithmic: false };
    const LOGARITHMIC: Axis = Axis { name: "", is_logarithmic: true };

    #[test]
    fn scales_have_round_ticks_and_everything_on_them() {
        let scale = Scale::over(PLAIN, [3.0, 97.0].into_iter());
        assert_eq!(scale.ticks(), [0.0, 20.0, 40.0, 60.0, 80.0]);
        assert_eq!((scale.place(0.0), scale.place(97.0)), (0.0, 1.0));
        let scale = Scale::over(LOGARITHMIC, [3.0, 970.0].into_iter());
        assert_eq!(scale.ticks(), [1.0, 10.0, 100.0, 1000.0]);
        assert!((scale.place(10.0) - 1.0 / 3.0).abs() < 1e-9);
        for axis in [PLAIN, LOGARITHMIC] {
            for values in [vec![], vec![5.0], vec![0.0], vec![f64::NAN, 1.0]] {
                let scale = Scale::over(axis, values.into_iter());
                assert!(scale.high > scale.low && !scale.ticks().is_empty());
            }
        }
    }

    #[test]
    fn names_cannot_break_out_of_a_drawing() {
        let plot = Plot::Bars { unit: "/s", bars: vec![("<b>".to_owned(), 1.0)] };
        let drawn = svg(&plot, "\"<i>");
        assert!(!drawn.contains("<b>") && !drawn.contains("<i>"), "{drawn}");
    }

    #[test]
    fn numbers_are_short() {
        let shown = [0.0, 0.123, 0.5, 1.0, 9.99, 12.34, 50.0, 123.4, 1e6].map(short);
        assert_eq!(shown, ["0", "0.12", "0.5", "1", "9.99", "12.3", "50", "123", "1000000"]);
    }
}

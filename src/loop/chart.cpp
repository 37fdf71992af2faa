#include "loop/chart.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace lockstep::loop {

namespace {

constexpr double kWidth = 560, kHeight = 236;
constexpr double kLeft = 58, kRight = 546, kTop = 12, kBottom = 206;
constexpr std::size_t kColours = 10, kMaxStretches = 400, kMaxColumns = 120, kMaxHovers = 100;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Range {
  double low = kInfinity, high = -kInfinity;
  void add(double x) { low = std::min(low, x), high = std::max(high, x); }
  bool empty() const { return low > high; }
};

// Round steps of 1, 2 or 5 times a power of ten that cut the range into about `count` parts.
std::vector<double> round_ticks(const Range& range, int count) {
  const double raw = (range.high - range.low) / count;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  const double part = raw / power;
  const double step = power * (part <= 1 ? 1 : part <= 2 ? 2 : part <= 5 ? 5 : 10);
  std::vector<double> ticks;
  for (double i = std::ceil(range.low / step - 1e-9); i * step <= range.high + 1e-9 * step; ++i)
    ticks.push_back(i == 0 ? 0 : i * step);
  return ticks;
}

// Values to pixels, one axis.
struct Scale {
  Range range;
  double from = 0, to = 0;  // pixels of range.low and range.high
  bool logarithmic = false;
  double zero = 0;  // pixel of an exact 0 on a logarithmic axis
  std::vector<double> ticks;

  double at(double v) const {
    if (logarithmic && v <= 0) return zero;
    const double low = logarithmic ? std::log10(range.low) : range.low;
    const double high = logarithmic ? std::log10(range.high) : range.high;
    return from + (to - from) * ((logarithmic ? std::log10(v) : v) - low) / (high - low);
  }
};

Scale x_scale(Range range) {
  if (range.low == range.high) range.low -= 1, range.high += 1;
  Scale s{range, kLeft, kRight, false, 0, {}};
  for (const double tick : round_ticks(range, 7))
    if (tick == std::floor(tick)) s.ticks.push_back(tick);
  return s;
}

Scale linear_scale(Range range) {
  const double size = std::max(std::abs(range.low), std::abs(range.high));
  if (size == 0) {
    range.high = 1;
  } else if (!(range.high - range.low > 1e-9 * size)) {  // a flat line stands in the middle
    const double margin = 0.1 * size;
    range.low -= margin, range.high += margin;
  } else {
    const double margin = 0.06 * (range.high - range.low);
    range.low = range.low >= 0 && range.low < margin ? 0 : range.low - margin;
    range.high += margin;
  }
  Scale s{range, kBottom, kTop, false, 0, {}};
  s.ticks = round_ticks(range, 5);
  return s;
}

Scale log_scale(const Range& positive, bool zeros) {
  const double low = std::floor(std::log10(positive.low) - 1e-9);
  const double high = std::ceil(std::log10(positive.high) + 1e-9);
  Scale s{{std::pow(10.0, low), std::pow(10.0, high)},
          kBottom - (zeros ? 22 : 0),
          kTop,
          true,
          kBottom,
          {}};
  const double step = std::max(1.0, std::ceil((high - low) / 5));
  for (double e = low; e <= high; e += step) s.ticks.push_back(std::pow(10.0, e));
  if (zeros) s.ticks.push_back(0);
  return s;
}

std::string tick_text(double v) {
  const double size = std::abs(v);
  if (v != 0 && (size < 1e-3 || size >= 1e6)) return fmt::format("{:.3g}", v);
  if (size >= 1e4) return fmt::format("{:g}k", v / 1e3);
  return fmt::format("{:.5g}", v);
}

std::string axes(const Scale& x, const Scale& y) {
  std::string out;
  for (const double tick : y.ticks)
    out += fmt::format(
        "<line class=\"grid\" x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/>"
        "<text class=\"tick\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"end\">{}</text>\n",
        kLeft, kRight, y.at(tick), y.at(tick), kLeft - 7, y.at(tick) + 3.5, tick_text(tick));
  for (const double tick : x.ticks)
    out += fmt::format(
        "<text class=\"tick\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{}</text>\n",
        x.at(tick), kBottom + 16, tick_text(tick));
  out += fmt::format(
      "<line class=\"axis\" x1=\"{0:.1f}\" x2=\"{1:.1f}\" y1=\"{2:.1f}\" y2=\"{2:.1f}\"/>"
      "<text class=\"tick\" x=\"{1:.1f}\" y=\"{3:.1f}\" text-anchor=\"end\">step</text>\n",
      kLeft, kRight, kBottom, kHeight - 2);
  return out;
}

std::vector<Point> thinned(const std::vector<Point>& points) {
  if (points.size() <= 2 * kMaxStretches) return points;
  std::vector<Point> out;
  for (std::size_t i = 0; i < kMaxStretches; ++i) {
    const std::size_t begin = i * points.size() / kMaxStretches;
    const std::size_t end = (i + 1) * points.size() / kMaxStretches;
    std::size_t least = begin, most = begin;
    for (std::size_t p = begin; p < end; ++p) {
      if (!std::isfinite(points[p].y)) continue;
      if (!(points[least].y <= points[p].y)) least = p;
      if (!(points[most].y >= points[p].y)) most = p;
    }
    out.push_back(points[std::min(least, most)]);
    if (least != most) out.push_back(points[std::max(least, most)]);
  }
  return out;
}

std::string hover_text(const Series& series, const Point& p, const std::string& unit) {
  return fmt::format("{}, step {}: {}{}", escape_html(series.name), number_text(p.x),
                     number_text(p.y), unit.empty() ? "" : " " + escape_html(unit));
}

std::string line(const Series& series, std::size_t colour, const Scale& x, const Scale& y,
                 const std::string& unit) {
  const std::vector<Point> points = thinned(series.points);
  std::string path, dots;
  bool pen_down = false;
  const std::size_t stride = 1 + points.size() / kMaxHovers;
  for (std::size_t i = 0; i < points.size(); ++i) {
    const Point& p = points[i];
    if (!std::isfinite(p.y)) {
      pen_down = false;
      continue;
    }
    const double px = x.at(p.x), py = y.at(p.y);
    path += fmt::format("{}{:.1f} {:.1f}", pen_down ? "L" : "M", px, py);
    const bool alone = !pen_down && (i + 1 == points.size() || !std::isfinite(points[i + 1].y));
    pen_down = true;
    // Beyond kMaxHovers points only every stride-th one answers to the pointer.
    const bool visible = alone || points.size() <= 24;
    if (!visible && i % stride != 0) continue;
    dots += fmt::format(
        "<circle class=\"dot{}\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"2.6\"><title>{}"
        "</title></circle>\n",
        visible ? "" : " faint", px, py, hover_text(series, p, unit));
  }
  return fmt::format("<g class=\"c{}\"><path class=\"line\" d=\"{}\"/>\n{}</g>\n",
                     colour % kColours, path, dots);
}

std::string legend(const Chart& chart) {
  std::string out = "<ul class=\"legend\">";
  for (std::size_t i = 0; i < chart.series.size(); ++i) {
    const Series& s = chart.series[i];
    if (s.points.empty()) continue;
    out += fmt::format("<li class=\"c{}\"><i></i>{} <b>{}</b></li>", i % kColours,
                       escape_html(s.name), number_text(s.points.back().y));
  }
  return out + "</ul>\n";
}

std::string figure(const Chart& chart, const std::string& plot, std::int64_t broken) {
  std::string note = escape_html(chart.note);
  if (broken > 0)
    note += fmt::format("{}{} value{} not finite, left out", note.empty() ? "" : "; ", broken,
                        broken == 1 ? "" : "s");
  return fmt::format(
      "<figure><figcaption><h3>{}{}</h3>{}</figcaption>\n{}"
      "<svg viewBox=\"0 0 {:.0f} {:.0f}\" role=\"img\" aria-label=\"{}\">\n{}</svg></figure>\n",
      escape_html(chart.title),
      chart.unit.empty() ? "" : " <small>" + escape_html(chart.unit) + "</small>",
      note.empty() ? "" : "<p>" + note + "</p>", legend(chart), kWidth, kHeight,
      escape_html(chart.title), plot);
}

}  // namespace

std::string line_chart(const Chart& chart) {
  Range x_range, y_range, positive;
  bool zeros = false, negative = false;
  std::int64_t broken = 0;
  for (const Series& s : chart.series)
    for (const Point& p : s.points) {
      x_range.add(p.x);
      if (!std::isfinite(p.y)) {
        ++broken;
        continue;
      }
      y_range.add(p.y);
      zeros = zeros || p.y == 0;
      negative = negative || p.y < 0;
      if (p.y > 0) positive.add(p.y);
    }
  if (x_range.empty()) return "";
  if (y_range.empty()) y_range = {0, 1};
  const bool logarithmic = chart.axis == Axis::kLogWhenWide && !negative && !positive.empty() &&
                           positive.high > 1000 * positive.low;
  const Scale x = x_scale(x_range);
  const Scale y = logarithmic ? log_scale(positive, zeros) : linear_scale(y_range);
  std::string plot = axes(x, y);
  for (std::size_t i = 0; i < chart.series.size(); ++i)
    plot += line(chart.series[i], i, x, y, chart.unit);
  return figure(chart, plot, broken);
}

std::string stacked_chart(const Chart& chart) {
  if (chart.series.empty() || chart.series[0].points.empty()) return "";
  const std::vector<Point>& steps = chart.series[0].points;
  const std::size_t columns = std::min(steps.size(), kMaxColumns);
  const auto begin = [&](std::size_t column) { return column * steps.size() / columns; };
  std::vector<std::vector<double>> height(columns, std::vector<double>(chart.series.size(), 0.0));
  double top = 0;
  for (std::size_t c = 0; c < columns; ++c) {
    double sum = 0;
    for (std::size_t s = 0; s < chart.series.size(); ++s) {
      for (std::size_t i = begin(c); i < begin(c + 1); ++i) {
        const double v = chart.series[s].points[i].y;
        if (std::isfinite(v) && v > 0) height[c][s] += v;
      }
      height[c][s] /= static_cast<double>(begin(c + 1) - begin(c));
      sum += height[c][s];
    }
    top = std::max(top, sum);
  }
  const double half = steps.size() > 1 ? 0.5 : 1;
  const Scale x = x_scale({steps.front().x - half, steps.back().x + half});
  const Scale y = linear_scale({0, top > 0 ? top : 1});
  std::string plot = axes(x, y);
  for (std::size_t c = 0; c < columns; ++c) {
    const double left = x.at(steps[begin(c)].x - 0.5),
                 right = x.at(steps[begin(c + 1) - 1].x + 0.5);
    const double gap = std::min(1.5, 0.2 * (right - left));
    double below = 0;
    for (std::size_t s = 0; s < chart.series.size(); ++s) {
      if (height[c][s] <= 0) continue;
      const double low = y.at(below), high = y.at(below + height[c][s]);
      below += height[c][s];
      plot += fmt::format(
          "<rect class=\"c{} bar\" x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\">"
          "<title>{}</title></rect>\n",
          s % kColours, left, high, std::max(0.5, right - left - gap), low - high,
          hover_text(chart.series[s], {steps[begin(c)].x, height[c][s]}, chart.unit));
    }
  }
  return figure(chart, plot, 0);
}

std::string escape_html(const std::string& text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '&')
      out += "&amp;";
    else if (c == '<')
      out += "&lt;";
    else if (c == '>')
      out += "&gt;";
    else if (c == '"')
      out += "&quot;";
    else if (c == '\'')
      out += "&#39;";
    else if (byte < 0x20 && c != '\n' && c != '\t')
      out += fmt::format("&#x{:x};", 0x2400 + byte);  // U+2400: pictures of the control characters
    else
      out += c;
  }
  return out;
}

std::string number_text(double x) {
  if (!std::isfinite(x)) return "–";
  if (x == std::floor(x) && std::abs(x) < 1e15) {
    std::string digits = fmt::format("{:.0f}", std::abs(x));
    for (std::ptrdiff_t at = static_cast<std::ptrdiff_t>(digits.size()) - 3; at > 0; at -= 3)
      digits.insert(static_cast<std::size_t>(at), ",");
    return (x < 0 ? "-" : "") + digits;
  }
  if (std::abs(x) >= 1000 && std::abs(x) < 1e15) return number_text(std::round(x));
  return fmt::format("{:.4g}", x);
}

}  // namespace lockstep::loop

// Charts as inline SVG text, for reports that need nothing from outside the file. Colours come from
// the page's style sheet (classes c0 .. c9), so one chart serves light and dark.
#pragma once

#include <string>
#include <vector>

namespace lockstep::loop {

struct Point {
  double x = 0, y = 0;
};

// x rises. A y that is not finite breaks the line and is counted in the chart's note.
struct Series {
  std::string name;
  std::vector<Point> points;
};

enum class Axis {
  kLinear,
  kLogWhenWide  // logarithmic when the positive values span over 1000 to 1; exact zeros then lie on
                // a line of their own at the bottom
};

struct Chart {
  std::string title;
  std::string unit;  // of y, "" for plain numbers
  std::string note;  // one line under the title
  std::vector<Series> series;
  Axis axis = Axis::kLinear;
};

// A <figure> with title, legend (last value of each series) and plot; "" when no series has a
// point. Long series are thinned to the least and greatest value of each of 400 stretches.
std::string line_chart(const Chart& chart);

// The same with stacked columns: all series share their x values; at most 120 columns (means of
// neighbours beyond that).
std::string stacked_chart(const Chart& chart);

// &, <, > and quotes as entities; control characters other than newline and tab as their pictures.
std::string escape_html(const std::string& text);

// Four significant digits ("0.0312", "1.25e-07", "12,345"); a dash when not finite. Whole numbers
// below 1e15 are written out.
std::string number_text(double x);

}  // namespace lockstep::loop

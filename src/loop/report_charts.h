// Which curves a report shows. One list serves the report of a run and the comparison of several.
#pragma once

#include <string>
#include <vector>

#include "loop/chart.h"

namespace lockstep::loop {

struct Curve {
  const char* metric;
  const char* name;  // in the legend
};

struct ChartPlan {
  const char* section;
  const char* title;
  const char* unit;
  Axis axis;
  const char* note;
  std::vector<Curve> curves;
};

// In the order of the page; plans of one section stand together.
const std::vector<ChartPlan>& chart_plans();

}  // namespace lockstep::loop

#include "loop/progress.h"

#include <gtest/gtest.h>
#include <pty.h>

#include "base/error.h"
#include "loop/log.h"
#include "loop/temp_dir.h"

namespace lockstep::loop {
namespace {

struct ProgressTest : TempDirTest {};

TEST_F(ProgressTest, durations) {
  EXPECT_EQ(format_duration(0.85), "850ms");
  EXPECT_EQ(format_duration(0.9999), "1.0s");
  EXPECT_EQ(format_duration(4.2), "4.2s");
  EXPECT_EQ(format_duration(59.99), "1m00s");
  EXPECT_EQ(format_duration(185), "3m05s");
  EXPECT_EQ(format_duration(7620), "2h07m");
  EXPECT_EQ(format_duration(0.0 / 0.0), "?");
  EXPECT_EQ(format_duration(-1), "?");
}

TEST_F(ProgressTest, bar_fits_and_extrapolates_from_the_resumed_step) {
  EXPECT_EQ(render_bar(0, 0, 10, 0, 80), "[" + std::string(40, '.') + "] 0/10");
  EXPECT_EQ(render_bar(0, 10, 10, 50, 80), "[" + std::string(40, '#') + "] 10/10");
  EXPECT_EQ(render_bar(0, 5, 10, 50, 80),
            "[" + std::string(20, '#') + std::string(20, '.') + "] 5/10  50.0s left");
  EXPECT_NE(render_bar(4, 5, 10, 3, 80).find("15.0s left"), std::string::npos);
  for (int width = 0; width < 60; ++width)
    EXPECT_LE(render_bar(0, 5, 10, 50, width).size(), static_cast<std::size_t>(width));
  EXPECT_EQ(render_bar(0, 0, 0, 0, 80), "[" + std::string(40, '#') + "] 0/0");
}

TEST_F(ProgressTest, plain_lines_where_there_is_no_terminal) {
  const auto path = dir / "out";
  std::FILE* out = std::fopen(path.c_str(), "w");
  {
    Progress p(out, 0, 2);
    p.note("start");
    p.step(1, "step 1", 1);
    p.step(2, "step 2", 2);
  }
  std::fclose(out);
  EXPECT_EQ(slurp(path), "start\nstep 1\nstep 2\n");
}

TEST_F(ProgressTest, a_terminal_gets_lines_and_one_bar) {
  int master = 0, slave = 0;
  winsize size{24, 30, 0, 0};
  ASSERT_EQ(::openpty(&master, &slave, nullptr, nullptr, &size), 0);
  std::FILE* out = ::fdopen(slave, "w");
  {
    Progress p(out, 0, 2);
    p.step(1, "one", 1);
    p.step(2, "two", 2);
  }
  const std::string wipe = "\r\x1b[K";
  const std::string expected =
      "one\r\n" + render_bar(0, 1, 2, 1, 29) + wipe + "two\r\n" + render_bar(0, 2, 2, 2, 29) + wipe;
  std::string text;
  char buffer[4096];
  while (text.size() < expected.size()) {  // the terminal hands over what it has so far
    const ssize_t got = ::read(master, buffer, sizeof buffer);
    ASSERT_GT(got, 0);
    text.append(buffer, static_cast<std::size_t>(got));
    if (text != expected.substr(0, text.size())) break;
  }
  std::fclose(out);
  ::close(master);
  EXPECT_EQ(text, expected);
}

TEST_F(ProgressTest, log_appends_and_refuses_a_bad_path) {
  for (int i = 0; i < 2; ++i) open_log(dir / "logs" / "l.log").info("50% {} done");
  const std::string text = slurp(dir / "logs" / "l.log");
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 2);
  EXPECT_NE(text.find(" info 50% {} done\n"), std::string::npos) << text;
  put("file", "");
  EXPECT_THROW(open_log(dir / "file" / "l.log"), base::SystemError);
}

}  // namespace
}  // namespace lockstep::loop

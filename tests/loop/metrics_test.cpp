#include "loop/metrics.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <cmath>
#include <csignal>
#include <cstring>
#include <limits>

#include "base/error.h"
#include "loop/run_folder.h"
#include "loop/temp_dir.h"
#include "loop/tensorboard.h"

namespace lockstep::loop {
namespace {

namespace fs = std::filesystem;
struct MetricsTest : TempDirTest {};

constexpr double kInf = std::numeric_limits<double>::infinity();

TEST_F(MetricsTest, line_has_fixed_order_and_round_trips) {
  const double x = 0.1 + 0.2;
  const Metrics values = {{"train/reward", x},          {"a", 1.0},       {"n", std::int64_t{-3}},
                          {"bad", std::nan("")},        {"worse", -kInf}, {"tiny", 5e-324},
                          {"sum", std::string("f\"0")}, {"huge", 1.7e308}};
  EXPECT_EQ(metrics_line(7, values),
            "{\"step\": 7, \"a\": 1.0, \"bad\": null, \"huge\": 1.7e+308, \"n\": -3, "
            "\"sum\": \"f\\\"0\", \"tiny\": 5e-324, \"train/reward\": 0.30000000000000004, "
            "\"worse\": null}\n");
  EXPECT_EQ(non_finite_metrics(values), (std::vector<std::string>{"bad", "worse"}));
  std::string line = metrics_line(7, values);
  line.pop_back();
  const auto row = parse_metrics_line(line);
  ASSERT_TRUE(row);
  EXPECT_EQ(row->step, 7);
  EXPECT_EQ(std::get<double>(row->values.at("train/reward")), x);
  EXPECT_EQ(std::get<double>(row->values.at("tiny")), 5e-324);
  EXPECT_EQ(std::get<std::int64_t>(row->values.at("n")), -3);
  EXPECT_TRUE(std::isnan(std::get<double>(row->values.at("bad"))));
  for (std::size_t n = 0; n < line.size(); ++n)
    EXPECT_FALSE(parse_metrics_line(line.substr(0, n))) << n;
  EXPECT_FALSE(parse_metrics_line("{\"step\": 1, \"a\": [1]}"));
  EXPECT_FALSE(parse_metrics_line(std::string(100000, '[')));
}

TEST_F(MetricsTest, resumed_file_equals_the_uninterrupted_one) {
  const auto write = [](MetricsWriter& w, int from, int to) {
    for (int s = from; s <= to; ++s) w.append(s, {{"x", s / 3.0}});
  };
  const fs::path whole = dir / "whole", cut = dir / "cut";
  {
    MetricsWriter w(whole);
    write(w, 1, 10);
  }
  for (const std::string tail : {"", "{\"step\": 8, \"x", "{\"step\"", "rubbish\n"}) {
    fs::remove(cut);
    {
      MetricsWriter w(cut);
      write(w, 1, 7);
    }
    std::ofstream(cut, std::ios::app | std::ios::binary) << tail;
    EXPECT_FALSE(truncate_metrics(cut, 5).empty());
    EXPECT_EQ(read_metrics(cut).back().step, 5);
    MetricsWriter w(cut);
    write(w, 6, 10);
    EXPECT_EQ(slurp(cut), slurp(whole));
  }
  EXPECT_EQ(std::distance(fs::directory_iterator(dir), fs::directory_iterator{}), 2);
}

TEST_F(MetricsTest, malformed_rows_are_named_and_gaps_reported) {
  const fs::path path = put("m", "{\"step\": 1}\nrubbish\n{\"step\": 2}\n");
  try {
    read_metrics(path);
    FAIL();
  } catch (const base::InputError& e) {
    EXPECT_NE(std::string(e.what()).find("m:2:"), std::string::npos) << e.what();
  }
  EXPECT_THROW(truncate_metrics(path, 2), base::InputError);
  EXPECT_NE(slurp(path).find("rubbish"), std::string::npos) << "a refused file must stay as it was";
  EXPECT_EQ(truncate_metrics(path, 1).size(), 1u);
  EXPECT_EQ(slurp(path), "{\"step\": 1}\n");
  EXPECT_TRUE(truncate_metrics(path, 1).empty());
  EXPECT_NE(truncate_metrics(path, 4).at(0).find("ends at step 1"), std::string::npos);
  EXPECT_EQ(truncate_metrics(dir / "new", 3).size(), 1u);
  EXPECT_TRUE(fs::exists(dir / "new"));
  EXPECT_TRUE(truncate_metrics(dir / "killed_before_the_first_save", 0).empty());
}

TEST_F(MetricsTest, steps_must_rise) {
  MetricsWriter w(dir / "m");
  w.append(3, {});
  EXPECT_THROW(w.append(3, {}), base::ContractError);
  EXPECT_THROW(w.append(4, {{"step", 1.0}}), base::ContractError);
  EXPECT_EQ(slurp(dir / "m"), "{\"step\": 3}\n");
}

TEST_F(MetricsTest, full_disk_is_a_clear_error) {
  MetricsWriter w("/dev/full");
  try {
    w.append(1, {{"x", 1.0}});
    FAIL() << "written to a full disk";
  } catch (const base::SystemError& e) {
    EXPECT_NE(std::string(e.what()).find("/dev/full"), std::string::npos);
    EXPECT_NE(std::string(e.what()).find("disk is full"), std::string::npos) << e.what();
  }
}

// The kernel takes a part of the line and refuses the rest: no half line may stay.
TEST_F(MetricsTest, a_write_that_stops_in_the_middle_leaves_whole_lines) {
  const fs::path path = dir / "m";
  const pid_t child = ::fork();
  if (child == 0) {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{100, 100};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    MetricsWriter w(path);
    int failures = 0;
    for (int s = 1; s < 9; ++s) try {
        w.append(s, {{"a_long_metric_name", 1.0 / 3}});
      } catch (const base::SystemError&) {
        ++failures;
      }
    ::_exit(failures);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 7);
  EXPECT_EQ(slurp(path), metrics_line(1, {{"a_long_metric_name", 1.0 / 3}}));
}

// A reader of its own, from the format's description.
struct Reader {
  std::string bytes;
  std::size_t at = 0;
  template <typename T>
  T take() {
    T x;
    std::memcpy(&x, bytes.data() + at, sizeof x);
    at += sizeof x;
    return x;
  }
  std::uint64_t varint() {
    std::uint64_t x = 0;
    for (int shift = 0;; shift += 7) {
      const unsigned char c = bytes[at++];
      x |= static_cast<std::uint64_t>(c & 0x7f) << shift;
      if (c < 0x80) return x;
    }
  }
  std::string text(std::size_t n) {
    at += n;
    return bytes.substr(at - n, n);
  }
};

std::uint32_t bitwise_crc32c(const std::string& data) {
  std::uint32_t crc = 0xffffffffu;
  for (unsigned char c : data)
    for (int bit = 0; bit < 8; ++bit) {
      const std::uint32_t low = (crc ^ (c >> bit)) & 1u;
      crc = (crc >> 1) ^ (low ? 0x82f63b78u : 0u);
    }
  return ~crc;
}

TEST_F(MetricsTest, crc32c_known_answers) {
  EXPECT_EQ(crc32c("123456789"), 0xe3069283u);
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8a9136aau);    // RFC 3720 B.4
  EXPECT_EQ(crc32c(std::string(32, '\xff')), 0x62a8ab43u);  // RFC 3720 B.4
}

TEST_F(MetricsTest, tensorboard_bytes_read_back) {
  TensorBoardWriter w(dir, 1700000000.5, 4);
  w.append(300, {{"train/reward", 0.25}, {"n", std::int64_t{9}}, {"hash", std::string("ff")}},
           1700000001.0);
  EXPECT_EQ(w.path().filename().string().rfind("events.out.tfevents.1700000000.", 0), 0u);
  Reader file{slurp(w.path())};
  std::vector<Reader> events;
  while (file.at < file.bytes.size()) {
    const auto masked = [](const std::string& s) {
      const std::uint32_t c = bitwise_crc32c(s);
      return static_cast<std::uint32_t>(((c >> 15) | (c << 17)) + 0xa282ead8u);
    };
    const std::string head = file.bytes.substr(file.at, 8);
    const auto length = file.take<std::uint64_t>();
    ASSERT_EQ(file.take<std::uint32_t>(), masked(head));
    const std::string data = file.text(length);
    ASSERT_EQ(file.take<std::uint32_t>(), masked(data));
    events.push_back({data});
  }
  ASSERT_EQ(events.size(), 3u);
  const double walls[] = {1700000000.5, 1700000000.5, 1700000001.0};
  const std::uint64_t steps[] = {0, 5, 300};
  const unsigned fields[] = {3, 7, 5};
  for (int i = 0; i < 3; ++i) {
    Reader& e = events[i];
    EXPECT_EQ(e.take<std::uint8_t>(), (1u << 3 | 1));
    EXPECT_EQ(e.take<double>(), walls[i]);
    EXPECT_EQ(e.take<std::uint8_t>(), (2u << 3 | 0));
    EXPECT_EQ(e.varint(), steps[i]);
    EXPECT_EQ(e.take<std::uint8_t>(), (fields[i] << 3 | 2));
    const std::uint64_t length = e.varint();
    EXPECT_EQ(length, e.bytes.size() - e.at);
  }
  EXPECT_EQ(events[0].text(13), "brain.Event:2");
  EXPECT_EQ(events[1].text(2), std::string("\x08\x01"));
  std::map<std::string, float> got;
  Reader& e = events[2];
  while (e.at < e.bytes.size()) {
    EXPECT_EQ(e.take<std::uint8_t>(), (1u << 3 | 2));
    const std::size_t end = e.varint() + e.at;
    EXPECT_EQ(e.take<std::uint8_t>(), (1u << 3 | 2));
    const std::string name = e.text(e.varint());
    EXPECT_EQ(e.take<std::uint8_t>(), (2u << 3 | 5));
    got[name] = e.take<float>();
    EXPECT_EQ(e.at, end);
  }
  EXPECT_EQ(got, (std::map<std::string, float>{{"n", 9.f}, {"train/reward", 0.25f}}));
}

TEST_F(MetricsTest, run_folder_is_locked_and_not_overwritten) {
  const fs::path root = dir / "runs" / "a";
  {
    const RunFolder folder = open_run_folder(root, false);
    for (const char* name : {"tb", "rollouts", "checkpoints", "logs"})
      EXPECT_TRUE(fs::is_directory(root / name));
    EXPECT_THROW(open_run_folder(root, true), base::SystemError);
    std::ofstream(folder.config()) << "x: 1\n";
    for (int s : {3, 5, 6, 12}) std::ofstream(folder.rollout_file(s)) << "{}\n";
    std::ofstream(folder.rollouts() / "train_data_stepX.jsonl") << "";
    discard_rollouts_after(folder, 5);
    EXPECT_TRUE(fs::exists(folder.rollout_file(5)));
    EXPECT_FALSE(fs::exists(folder.rollout_file(6)));
    EXPECT_FALSE(fs::exists(folder.rollout_file(12)));
    EXPECT_TRUE(fs::exists(folder.rollouts() / "train_data_stepX.jsonl"));
  }
  EXPECT_THROW(open_run_folder(root, false), base::InputError);
  EXPECT_NO_THROW(open_run_folder(root, true));
  fs::create_directory(root.string() + ".1");
  EXPECT_EQ(set_aside_run(root), root.string() + ".2");
  EXPECT_FALSE(fs::exists(root));
  put("file", "");
  EXPECT_THROW(open_run_folder(dir / "file" / "run", false), base::SystemError);
}

}  // namespace
}  // namespace lockstep::loop

// TensorBoard event files, without protobuf. A file is a sequence of TFRecords
//   u64 length | u32 masked_crc(length) | data | u32 masked_crc(data)     (little endian)
// with masked_crc(x) = rotate_right(crc32c(x), 15) + 0xa282ead8; each record is an Event message
//   1 wall_time: double, 2 step: int64, 3 file_version: string,
//   5 summary { repeated 1 value { 1 tag: string, 2 simple_value: float } }, 7 session_log { 1
//   status }
// (tensorflow/core/lib/io/record_writer.cc and tensorflow/core/util/event.proto). The first record
// holds file_version "brain.Event:2".
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "base/file_io.h"
#include "loop/metrics.h"

namespace lockstep::loop {

std::uint32_t crc32c(std::string_view data);  // Castagnoli, as in RFC 3720
std::string tf_record(std::string_view data);

class TensorBoardWriter {
 public:
  // Creates a new event file in `folder`. On resume, `resumed_after` is the checkpoint's step:
  // TensorBoard then hides what earlier files hold of later steps.
  TensorBoardWriter(const std::filesystem::path& folder, double wall_time,
                    std::optional<std::int64_t> resumed_after = std::nullopt);

  // Numbers only; texts are left out. SystemError when the disk refuses.
  void append(std::int64_t step, const Metrics& values, double wall_time);

  const std::filesystem::path& path() const { return file_.path(); }

 private:
  base::OutputFile file_;
};

}  // namespace lockstep::loop

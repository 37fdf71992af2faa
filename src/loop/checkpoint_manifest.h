// manifest.json of a checkpoint folder: what every file of it must be, to the byte. Its last field
// is the hash of the manifest's own text with that field zeroed, so damage to the manifest shows,
// too.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace lockstep::loop {

inline constexpr const char* kManifestName = "manifest.json";

struct ManifestFile {
  std::string file;  // relative to the folder, '/' between parts
  std::uint64_t bytes = 0;
  std::string xxh3_128;
};

struct Manifest {
  std::int64_t step = 0;
  std::string contract_version;  // docs/numerics.md that the weights were trained under
  std::string config_hash;       // loop/config_load.h
  bool healthy = true;           // false: a weight was not finite
  std::optional<double> metric;  // what retention ranks by
  std::vector<ManifestFile> files;
};

std::string manifest_text(const Manifest& manifest);

// InputError starts with `where`: not JSON, changed since it was written, a field missing or of the
// wrong type, a file name that leaves the folder.
Manifest parse_manifest(const std::string& text, const std::string& where);

}  // namespace lockstep::loop

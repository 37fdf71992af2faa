// JSON files that come from outside (config.json, tokenizer.json, shard indices), read without
// guessing.
#pragma once

#include <cstddef>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace lockstep::model {

// The document. InputError naming the file when it is missing, larger than `limit` bytes, not valid
// JSON, nested deeper than 32 levels, has a key twice in one object, or is not an object at the
// top.
nlohmann::json read_json_file(const std::filesystem::path& path, std::size_t limit = 1 << 20);
nlohmann::json parse_strict_json(std::string_view text, const std::string& file);

// Indented by two, keys sorted, one newline at the end.
std::string json_text(const nlohmann::json& document);

}  // namespace lockstep::model

#include "model/post_processor.h"

namespace lockstep::model {

namespace {

constexpr std::int32_t kMaxId = (1 << 22) - 1;
constexpr std::size_t kMaxItems = 4096;

void append_special(const JsonPart& part, const std::string& name, std::vector<std::int32_t>& out) {
  const JsonPart special = part["special_tokens"].object()[name];
  if (special.is_null())
    part.fail(fmt::format("special_tokens lacks '{}', which the template names", shown(name)));
  const JsonPart ids = special.object()["ids"];
  for (std::size_t i = 0; i < ids.array().value.size(); ++i)
    out.push_back(static_cast<std::int32_t>(ids.at(i).integer(0, kMaxId)));
}

std::vector<std::int32_t> read_template(const JsonPart& part) {
  part.only({"type", "single", "pair", "special_tokens"});
  std::vector<std::int32_t> out;
  const JsonPart single = part["single"];
  for (std::size_t i = 0; i < single.array().value.size(); ++i) {
    const JsonPart item = single.at(i);
    item.only({"SpecialToken", "Sequence"});
    if (const JsonPart special = item["SpecialToken"]; !special.is_null()) {
      append_special(part, special.object()["id"].text(), out);
    } else {
      if (item["Sequence"].object()["id"].text() != "A") item.fail("a single text is sequence A");
      out.push_back(kTextItself);
    }
    if (out.size() > kMaxItems) single.fail(fmt::format("has more than {} tokens", kMaxItems));
  }
  return out;
}

}  // namespace

std::vector<std::int32_t> read_post_processor(const JsonPart& part) {
  if (part.is_null()) return {kTextItself};
  const std::string type = part.object()["type"].text();
  if (type == "TemplateProcessing") return read_template(part);
  if (type == "ByteLevel") {
    part.only({"type", "add_prefix_space", "trim_offsets", "use_regex"});
    return {kTextItself};
  }
  if (type != "Sequence")
    part.fail(
        fmt::format("type '{}' is not supported; Lockstep reads TemplateProcessing, "
                    "ByteLevel and Sequence",
                    shown(type)));
  part.only({"type", "processors"});
  const JsonPart members = part["processors"];
  std::vector<std::int32_t> out = {kTextItself};
  for (std::size_t i = 0; i < members.array().value.size(); ++i) {
    std::vector<std::int32_t> outer;
    for (const std::int32_t id : read_post_processor(members.at(i)))
      if (id == kTextItself) {
        outer.insert(outer.end(), out.begin(), out.end());
      } else {
        outer.push_back(id);
      }
    if (outer.size() > kMaxItems) part.fail(fmt::format("gives more than {} tokens", kMaxItems));
    out = std::move(outer);
  }
  return out;
}

}  // namespace lockstep::model

#include "model/hf_rope.h"

#include "model/rope.h"

namespace lockstep::model {

using nlohmann::json;

namespace {

// yarn's factor of cos and sin: given, or from the scaling.
double read_attention_factor(KeyReader& rope, const RopeScaling& s) {
  double own = yarn_attention_factor(s.factor);
  if (s.mscale != 0 && s.mscale_all_dim != 0)
    own = yarn_attention_factor(s.factor, s.mscale) /
          yarn_attention_factor(s.factor, s.mscale_all_dim);
  return rope.number("attention_factor", own);
}

// The keys of rope_scaling or rope_parameters behind the kind.
RopeScaling read_rope_scaling(KeyReader& rope, std::int64_t max_positions) {
  RopeScaling s;
  const char* key = rope.has("rope_type") ? "rope_type" : "type";
  const std::string kind = rope.text(key, "default");
  if (rope.text("type", kind) != kind) rope.refuse("type", "contradicts rope_type ('{}')", kind);
  rope.only("partial_rotary_factor", 1.0);
  if (kind == "default") return s;
  s.factor = rope.number("factor");
  if (!(s.factor > 0)) rope.refuse("factor", "{} must be above 0", s.factor);
  if (kind == "linear") {
    s.kind = RopeScaling::kLinear;
  } else if (kind == "llama3") {
    s.kind = RopeScaling::kLlama3;
    s.original_positions = rope.integer("original_max_position_embeddings");
    s.low_freq_factor = rope.number("low_freq_factor");
    s.high_freq_factor = rope.number("high_freq_factor");
  } else if (kind == "yarn") {
    s.kind = RopeScaling::kYarn;
    s.original_positions = rope.integer("original_max_position_embeddings", max_positions);
    s.beta_fast = rope.number("beta_fast", 32);
    s.beta_slow = rope.number("beta_slow", 1);
    s.truncate = rope.boolean("truncate", true);
    s.mscale = rope.number("mscale", 0);
    s.mscale_all_dim = rope.number("mscale_all_dim", 0);
    s.attention_factor = read_attention_factor(rope, s);
  } else {
    rope.refuse(key, "'{}' is not supported, only default, linear, llama3 and yarn", kind);
  }
  return s;
}

}  // namespace

void read_rope(KeyReader& r, ModelConfig& c, double theta_fallback) {
  const auto theta = [&](KeyReader& from) {
    return theta_fallback == 0 ? from.number("rope_theta")
                               : from.number("rope_theta", theta_fallback);
  };
  const bool parameters = r.has("rope_parameters");
  if (parameters) r.absent("rope_scaling");
  const char* key = parameters ? "rope_parameters" : "rope_scaling";
  const json* object = r.find(key);
  r.skip({"rope_parameters", "rope_scaling", "rope_theta"});
  if (object == nullptr) {
    c.rope_theta = theta(r);
    return;
  }
  if (!object->is_object()) r.refuse(key, "expected an object");
  KeyReader rope(*object, r.file(), std::string(key) + ".");
  c.rope_scaling = read_rope_scaling(rope, c.max_positions);
  const bool inside = parameters || rope.has("rope_theta");
  c.rope_theta = inside ? theta(rope) : theta(r);
  rope.skip({"rope_theta"});
  rope.finish();
  if (inside && r.has("rope_theta") && r.number("rope_theta") != c.rope_theta)
    r.refuse("rope_theta", "{} contradicts {}.rope_theta ({})", r.number("rope_theta"), key,
             c.rope_theta);
}

json rope_scaling_json(const RopeScaling& s) {
  switch (s.kind) {
    case RopeScaling::kNone:
      return nullptr;
    case RopeScaling::kLinear:
      return {{"rope_type", "linear"}, {"factor", s.factor}};
    case RopeScaling::kLlama3:
      return {{"rope_type", "llama3"},
              {"factor", s.factor},
              {"original_max_position_embeddings", s.original_positions},
              {"low_freq_factor", s.low_freq_factor},
              {"high_freq_factor", s.high_freq_factor}};
    case RopeScaling::kYarn: {
      json out = {{"rope_type", "yarn"},
                  {"factor", s.factor},
                  {"original_max_position_embeddings", s.original_positions},
                  {"beta_fast", s.beta_fast},
                  {"beta_slow", s.beta_slow},
                  {"truncate", s.truncate},
                  {"attention_factor", s.attention_factor}};
      if (s.mscale != 0) out["mscale"] = s.mscale;
      if (s.mscale_all_dim != 0) out["mscale_all_dim"] = s.mscale_all_dim;
      return out;
    }
  }
  base::fail<base::ContractError>("no rope scaling {}", static_cast<int>(s.kind));
}

}  // namespace lockstep::model

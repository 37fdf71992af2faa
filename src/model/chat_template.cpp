#include "model/chat_template.h"
namespace lockstep::model {
ChatTemplate recognise_chat_template(std::string_view) { return {}; }
}

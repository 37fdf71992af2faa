// SIGINT and SIGTERM as a question: the loop asks between steps, saves a checkpoint and ends. A
// second signal kills.
#pragma once

namespace lockstep::loop {

void catch_interrupts();
bool interrupted();

}  // namespace lockstep::loop

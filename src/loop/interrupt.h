// SIGINT and SIGTERM as a question: the loop asks between steps, saves a checkpoint and ends. The
// first says so on standard error at once, for a step can be long; the second kills.
#pragma once

namespace lockstep::loop {

void catch_interrupts();
bool interrupted();

}  // namespace lockstep::loop

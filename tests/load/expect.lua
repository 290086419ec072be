-- One call again and again, which is always to be answered with one status.
--   wrk -s expect.lua URL -- STATUS METHOD PATH|@FILE [BODY]
-- @FILE has paths, a line each, which are called in turn.

local report = require "report"
local expected
local calls, turn = {}, 0

function init(arguments)
  local method, place, body = arguments[2], arguments[3], arguments[4]
  local headers = body and { ["Content-Type"] = "application/json" } or {}
  expected = tonumber(arguments[1])
  if place:sub(1, 1) == "@" then
    for path in io.lines(place:sub(2)) do
      calls[#calls + 1] = wrk.format(method, path, headers, body)
    end
  else
    calls[1] = wrk.format(method, place, headers, body)
  end
  turn = number * 7919
end

function request()
  turn = turn + 1
  return calls[turn % #calls + 1]
end

function response(status, headers, body)
  if status == expected then
    succeeded = succeeded + 1
  else
    report.fail(status, body)
  end
end

-- Acquire and release: a lock that is held is given back, else one is taken.
--   wrk -s cycle.lua URL -- POOLS SEED [keyed]
-- A thread's locks are on a stack, so it works with any number of connections. `keyed` sends an
-- Idempotency-Key with each acquire.

local report = require "report"
local stack, held = {}, {}
local pools, keyed, single

local function acquire(pool)
  local body = '{"project_id":"' .. report.project(pool) .. '","holder":"bench","ttl":3600}'
  local headers = { ["Content-Type"] = "application/json", ["Authorization"] = wrk.headers["Authorization"] }
  if keyed then
    headers["Idempotency-Key"] = string.format("%04x%04x-%04x-4%03x-8%03x-%04x%04x%04x",
      math.random(0, 65535), math.random(0, 65535), math.random(0, 65535), math.random(0, 4095),
      math.random(0, 4095), math.random(0, 65535), math.random(0, 65535), math.random(0, 65535))
  end
  return wrk.format("POST", "/locks", headers, body)
end

function init(arguments)
  pools, keyed = tonumber(arguments[1]), arguments[3] == "keyed"
  math.randomseed(tonumber(arguments[2]) + number)
  if pools == 1 and not keyed then single = acquire(1) end
end

function request()
  local id = table.remove(stack)
  if id then
    held[id] = nil
    return wrk.format("DELETE", "/locks/" .. id)
  end
  return single or acquire(math.random(pools))
end

function response(status, headers, body)
  if status == 204 then
    succeeded = succeeded + 1
    return
  end
  local id = status == 201 and body:match('^{"id":"([%x-]+)"')
  if not id then
    report.fail(status, body)
  elseif held[id] then
    report.fail(status, "a lock id was given twice: " .. id)
  else
    held[id] = true
    stack[#stack + 1] = id
    succeeded = succeeded + 1
  end
end

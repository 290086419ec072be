-- Count a request for a token, or that one has failed: over one minute, which begins with the first request.
--   $1  who asks, and from where  bytea[]  (hashes, in their order)
--   $2  requests                  int      (so many more)
--   $3  failures                  int      (so many more)
-- One atomic statement, so that all workers and replicas count as one; all take the rows in one order.
insert into token_requests as counted (caller, since, requests, failures)
select caller, clock_timestamp(), $2::int, $3::int
from unnest($1::bytea[]) as asking (caller)
on conflict (caller) do update
set since = case
        when counted.since > excluded.since - interval '1 minute' then counted.since
        else excluded.since
    end,
    requests = excluded.requests
        + case when counted.since > excluded.since - interval '1 minute' then counted.requests else 0 end,
    failures = excluded.failures
        + case when counted.since > excluded.since - interval '1 minute' then counted.failures else 0 end
returning caller, requests, failures,
    greatest(1, ceil(extract(epoch from since + interval '1 minute' - clock_timestamp())))::int as retry_after

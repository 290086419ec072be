drop view lock_states;

alter table history drop column client_id;

alter table locks drop column client_id;

create view lock_states as
select
    locks.*,
    case
        when lock_id is not null and expires_at > statement_timestamp() then 'locked'
        when quarantine is not null then 'quarantined'
        when ready_at > statement_timestamp() then 'resting'
        else 'free'
    end as state
from locks;

drop table token_requests;

drop table clients;
